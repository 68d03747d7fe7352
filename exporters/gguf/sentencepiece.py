"""SentencePiece-style BPE (Llama 1 and 2, TinyLlama): merge scores and the treatment of spaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from exporters.gguf.byte_level import bpe_merges
from exporters.gguf.vocabulary import Rules
from pipeline.errors import UnsupportedError

_SPACE = "\u2581"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}

_STRIPPED = "no space is put in front of texts that start with one; llama.cpp puts one"
_FIRST = "no space is put after special tokens; llama.cpp puts one"
_MERGES = (
    "{} token pairs that are no merges, or out of order; llama.cpp merges whatever makes a token"
)


def sentencepiece_rules(spec: Mapping[str, Any]) -> Rules:
    """Rules of a BPE tokenizer with byte fallback, whose words start with U+2581.

    llama.cpp repeatedly merges the neighbours whose union is the token of the highest score
    (llm_tokenizer_spm in llama-vocab.cpp), so the score of a token is the negated rank of the
    merge that makes it.

    Args:
        spec: Content of tokenizer.json.

    Raises:
        UnsupportedError: Stock llama.cpp has no equivalent.
    """
    model = spec["model"]
    missing = sum(f"<0x{byte:02X}>" not in model["vocab"] for byte in range(256))
    if missing:
        _refuse(f"byte fallback with {missing} of the 256 bytes missing")
    merges = bpe_merges(model)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = {token: -float(ranks.get(token, len(merges))) for token in model["vocab"]}
    add_space_prefix, notes = _spaces(spec)
    inexact = _inexact_pairs(model["vocab"], merges)
    if inexact:
        notes.append(_MERGES.format(inexact))
    return Rules(
        model="llama",
        pre="default",
        scores=scores,
        add_space_prefix=add_space_prefix,
        notes=tuple(notes),
    )


def _spaces(spec: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether a space is put in front of texts, and where llama.cpp differs in that."""
    normalizer, pre_tokenizer = spec.get("normalizer"), spec.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    if pre_tokenizer is None and steps in ([_REPLACE], [_PREPEND, _REPLACE]):
        return len(steps) == 2, []
    if steps:
        _refuse(f"the normalizer {normalizer!r}")
    metaspace = pre_tokenizer or {}
    if metaspace.get("replacement") != _SPACE or metaspace.get("split", True):
        _refuse(f"the split rule {pre_tokenizer!r}")
    scheme = metaspace.get("prepend_scheme", "always")
    if scheme == "never":
        return False, []
    return True, [_STRIPPED, _FIRST] if scheme == "first" else [_STRIPPED]


def _inexact_pairs(vocab: Mapping[str, int], merges: list[tuple[str, str]]) -> int:
    """Pairs that only llama.cpp merges, and merges that it does earlier than they are listed."""
    listed, closed, last, inexact = set(merges), set(), "", 0
    for left, right in merges:
        token = left + right
        if token != last:
            inexact += token in closed
            closed.add(last)
            last = token
    for token in vocab:
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        inexact += sum(
            pair not in listed for pair in pairs if pair[0] in vocab and pair[1] in vocab
        )
    return inexact


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        f"tokenizer not supported in GGUF: {what}",
        why="stock llama.cpp has no tokenizer that gives the same token ids",
    )
