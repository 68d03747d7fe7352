"""A tokenizer of transformers in llama.cpp's terms.

What counts is the tokenizer that transformers runs, because it is the reference: transformers
completes, converts or rebuilds what the files say, and differently from version to version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporters.gguf.byte_level import byte_level_rules
from exporters.gguf.fields import Config, integer
from exporters.gguf.sentencepiece import sentencepiece_rules
from exporters.gguf.vocabulary import Rules, TokenType, Vocabulary
from pipeline.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile(r"<0x[0-9A-F]{2}>\Z")
_NO_KEY = re.compile(r"[^0-9A-Za-z]")


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, config: Config) -> Vocabulary:
    """What llama.cpp has to know to split texts as `tokenizer` does.

    Args:
        tokenizer: Loaded by the caller, who decides what code that may run.
        config: Content of config.json; its `vocab_size` is the number of rows of the embedding.

    Raises:
        InputError: More tokens than the embedding has rows, or two with the same text.
        UnsupportedError: Stock llama.cpp has no tokenizer that gives the same ids.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = spec["model"]["type"]
    if kind != "BPE":
        raise UnsupportedError(
            f"tokenizer not supported in GGUF: {kind}", why="only BPE tokenizers are exported"
        )
    rules = (sentencepiece_rules if spec["model"].get("byte_fallback") else byte_level_rules)(spec)
    tokens = _tokens(spec, integer(config, "vocab_size"))
    ends = _ends(tokenizer)
    special, special_notes = _special_ids(tokenizer, config, ends, len(tokens))
    templates, template_notes = _chat_templates(tokenizer.chat_template)
    notes = (*rules.notes, *_added_token_notes(spec["added_tokens"]))
    return Vocabulary(
        model=rules.model,
        pre=rules.pre,
        tokens=tokens,
        token_types=_token_types(tokens, spec, rules),
        merges=rules.merges,
        scores=tuple(rules.scores.get(token, 0.0) for token in tokens) if rules.scores else (),
        **special,
        add_bos=ends["bos"] is not None,
        add_eos=ends["eos"] is not None,
        add_space_prefix=rules.add_space_prefix,
        chat_template=templates.pop("default", None),
        chat_templates=templates,
        notes=(*notes, *special_notes, *template_notes),
    )


def _tokens(spec: Mapping[str, Any], rows: int) -> tuple[str, ...]:
    """One text for each row of the embedding; rows without a token get a placeholder."""
    by_id = {index: token for token, index in spec["model"]["vocab"].items()}
    by_id.update((token["id"], token["content"]) for token in spec["added_tokens"])
    if max(by_id, default=0) >= rows:
        raise InputError(
            f"the tokenizer has token ids up to {max(by_id)}, the embedding has {rows} rows",
            why="vocab_size in config.json is smaller than the tokenizer",
            fix="resize the embedding, or remove the added tokens",
        )
    tokens = tuple(by_id.get(index, f"[PAD{index}]") for index in range(rows))
    if len(set(tokens)) != rows:
        raise InputError("two token ids have the same text", why="llama.cpp aborts on such a file")
    return tokens


def _token_types(
    tokens: Sequence[str], spec: Mapping[str, Any], rules: Rules
) -> tuple[TokenType, ...]:
    types = {
        token: TokenType.BYTE if rules.model == "llama" and _BYTE.match(token) else TokenType.NORMAL
        for token in spec["model"]["vocab"]
    }
    for added in spec["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        types[added["content"]] = kind
    if rules.model == "llama" and spec["model"].get("unk_token") is not None:
        types[spec["model"]["unk_token"]] = TokenType.UNKNOWN
    return tuple(types.get(token, TokenType.UNUSED) for token in tokens)


def _ends(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """The tokens that are really put around a text, whatever the flags in the files say."""
    whole = tokenizer("hi")["input_ids"]
    inner = tokenizer("hi", add_special_tokens=False)["input_ids"]
    extra = len(whole) - len(inner)
    for before in (1, 0):
        after = extra - before
        if after in (0, 1) and whole[before : len(whole) - after] == inner:
            return {"bos": whole[0] if before else None, "eos": whole[-1] if after else None}
    raise UnsupportedError(
        f"tokenizer not supported in GGUF: it encodes 'hi' as {whole}, {inner} without extras",
        why="llama.cpp adds one token in front of a text and one behind, at most",
    )


def _special_ids(
    tokenizer: PreTrainedTokenizerFast, config: Config, ends: Mapping[str, int | None], rows: int
) -> tuple[dict[str, int | None], list[str]]:
    """Ids of the special tokens by their field in `Vocabulary`, and notes."""
    candidates = {
        "bos": (ends["bos"], tokenizer.bos_token_id, config.get("bos_token_id")),
        "eos": (ends["eos"], tokenizer.eos_token_id, config.get("eos_token_id")),
        "pad": (tokenizer.pad_token_id, config.get("pad_token_id")),
        "unk": (tokenizer.unk_token_id,),
    }
    found: dict[str, int | None] = {}
    notes = []
    for name, values in candidates.items():
        ids = _ids(values)
        within = [token for token in ids if token < rows]
        found[name] = within[0] if within else None
        # llama.cpp refuses to load a file that names a token it does not hold.
        notes += [
            f"{name} token id {token} left out: the embedding has {rows} rows"
            for token in dict.fromkeys(ids)
            if token >= rows
        ]
    if found["eos"] is None:
        notes.append("no end-of-text token; llama.cpp will stop at its default for this model type")
    return found, notes


def _ids(candidates: Sequence[Any]) -> list[int]:
    """Token ids, best first; config.json may hold a list of them, or -1 for none."""
    flat: list[Any] = []
    for candidate in candidates:
        flat += candidate if isinstance(candidate, list) else [candidate]
    return [token for token in flat if type(token) is int and token >= 0]


def _chat_templates(template: Any) -> tuple[dict[str, str], list[str]]:
    """Templates by the name that GGUF keys spell, in ASCII letters, digits and _; and notes."""
    named = template if isinstance(template, Mapping) else {"default": template}
    found: dict[str, str] = {}
    notes = []
    for name, source in named.items():
        if not source:
            continue
        key = _NO_KEY.sub("_", name)
        if not key or key in found:
            notes.append(f"chat template {name!r} left out: another one is called {key!r} in GGUF")
        else:
            found[key] = source
    if found and "default" not in found:
        notes.append(
            f"no default chat template, only {', '.join(found)}; llama.cpp will assume ChatML"
        )
    return found, notes


def _added_token_notes(added: Sequence[Mapping[str, Any]]) -> list[str]:
    flagged = [
        token["content"]
        for token in added
        if token["lstrip"] or token["rstrip"] or token["single_word"]
    ]
    if not flagged:
        return []
    return [f"{len(flagged)} added tokens depend on the text around them; llama.cpp ignores that"]
