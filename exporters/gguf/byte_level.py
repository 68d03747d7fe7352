"""Byte-level BPE (GPT-2, Llama 3, Qwen): merges, and llama.cpp's name of the split rule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from exporters.gguf.vocabulary import Rules
from pipeline.errors import UnsupportedError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", _DIGIT)

# Split patterns in order -> the `pre` names of llama.cpp that apply them (llm_tokenizer_bpe in
# llama-vocab.cpp), each with whether it takes a whole word that is a token without merging.
_PRE_NAMES: dict[tuple[str, ...], dict[bool, str]] = {
    (_LLAMA3,): {True: "llama-bpe", False: "smaug-bpe"},
    (_QWEN2,): {False: "qwen2"},
    (_GPT2,): {False: "gpt-2"},
    (_DIGIT, _GPT2): {False: "smollm"},
}


def byte_level_rules(spec: Mapping[str, Any]) -> Rules:
    """Rules of a byte-level BPE tokenizer.

    Args:
        spec: Content of tokenizer.json.

    Raises:
        UnsupportedError: Stock llama.cpp has no equivalent.
    """
    model = spec["model"]
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            _refuse(f"BPE with {key} {model[key]!r}")
    merges = tuple(f"{left} {right}" for left, right in bpe_merges(model))
    if not merges or any(merge.count(" ") != 1 for merge in merges):
        _refuse("BPE without merges, or with a space inside a merged token")
    return Rules(
        model="gpt2",
        pre=_pre_name(spec),
        merges=merges,
        notes=_normalizer_notes(spec.get("normalizer")),
    )


def bpe_merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges in order; tokenizer.json writes each as ``"a b"`` or as ``["a", "b"]``."""
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(left, right) for left, right in pairs]


def _pre_name(spec: Mapping[str, Any]) -> str:
    names = _PRE_NAMES.get(_split_patterns(spec.get("pre_tokenizer")))
    if names is None:
        _refuse(f"the split rule {json.dumps(spec.get('pre_tokenizer'))[:300]}")
    ignore_merges = bool(spec["model"].get("ignore_merges"))
    preferred = next(iter(names))
    if ignore_merges == preferred or not _has_unreachable_token(spec):
        return names[preferred]
    if ignore_merges not in names:
        _refuse(f"ignore_merges={ignore_merges} with tokens that no merge produces")
    return names[ignore_merges]


def _split_patterns(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Patterns whose matches become words, in order; empty if there is more to it than that."""
    if pre_tokenizer is None:
        return ()
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    patterns = []
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}:
                patterns.append(regex if not step.get("invert") else "")
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(_DIGIT)
            case {"type": "ByteLevel", "add_prefix_space": False} if step is steps[-1]:
                patterns += [_GPT2] if step.get("use_regex", True) else []
                return tuple(patterns)
            case _:
                break
    return ()


def _has_unreachable_token(spec: Mapping[str, Any]) -> bool:
    """Whether merging the characters of some token gives something else than that token."""
    from tokenizers.models import BPE

    model = spec["model"]
    bpe = BPE(vocab=model["vocab"], merges=bpe_merges(model))
    added = {token["content"] for token in spec["added_tokens"]}
    return any(
        [piece.id for piece in bpe.tokenize(token)] != [index]
        for token, index in model["vocab"].items()
        if token not in added
    )


def _normalizer_notes(normalizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    if normalizer is None:
        return ()
    if normalizer.get("type") != "NFC":
        _refuse(f"the normalizer {normalizer.get('type')!r}")
    return ("llama.cpp does not compose characters (NFC): decomposed accents split differently",)


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"tokenizer not supported in GGUF: {what}",
        why="stock llama.cpp has no tokenizer that gives the same token ids",
    )
