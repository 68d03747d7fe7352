"""The tokenizer that a GGUF file carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from exporters.gguf.fields import KeyValue


class TokenType(IntEnum):
    """``enum llama_token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Rules:
    """How a tokenizer splits text, apart from the tokens; fields as in `Vocabulary`."""

    model: str
    pre: str
    merges: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    add_space_prefix: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and rules, in the terms of llama.cpp.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece BPE).
        pre: llama.cpp's name of the rule that cuts text into words before merging.
        tokens: Text of each token, one for each row of the embedding.
        token_types: `TokenType` of each token.
        merges: BPE merges in order, ``left right`` (model gpt2).
        scores: Merge priority of each token, highest first (model llama).
        bos: Id of the token at the beginning of a text, and so on; None if there is none.
        add_bos: Whether texts start with `bos`.
        add_eos: Whether texts end with `eos`.
        add_space_prefix: Whether a space is put in front of texts.
        chat_template: Jinja source, never run here; None if there is none.
        chat_templates: More of them by name (ASCII letters, digits and _), such as ``tool_use``.
        notes: Where llama.cpp is known to split texts differently from the original tokenizer.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    unk: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def metadata(self) -> list[KeyValue]:
        """The ``tokenizer.*`` entries.

        Both ``add_*_token`` flags are always written: without them llama.cpp falls back on a
        default that depends on `pre`.
        """
        entries = [
            KeyValue("model", "string", self.model),
            KeyValue("pre", "string", self.pre),
            KeyValue("tokens", "string[]", self.tokens),
            KeyValue("token_type", "int32[]", tuple(int(kind) for kind in self.token_types)),
        ]
        if self.merges:
            entries.append(KeyValue("merges", "string[]", self.merges))
        if self.scores:
            entries.append(KeyValue("scores", "float32[]", self.scores))
        ids = {"bos": self.bos, "eos": self.eos, "padding": self.pad, "unknown": self.unk}
        entries += [
            KeyValue(f"{name}_token_id", "uint32", token)
            for name, token in ids.items()
            if token is not None
        ]
        entries += [
            KeyValue("add_bos_token", "bool", self.add_bos),
            KeyValue("add_eos_token", "bool", self.add_eos),
            KeyValue("add_space_prefix", "bool", self.add_space_prefix),
        ]
        entries = [KeyValue(f"tokenizer.ggml.{key}", kind, value) for key, kind, value in entries]
        if self.chat_template is not None:
            entries.append(KeyValue("tokenizer.chat_template", "string", self.chat_template))
        entries += [
            KeyValue(f"tokenizer.chat_template.{name}", "string", template)
            for name, template in self.chat_templates.items()
        ]
        if self.chat_templates:
            names = tuple(self.chat_templates)
            entries.append(KeyValue("tokenizer.chat_templates", "string[]", names))
        return entries
