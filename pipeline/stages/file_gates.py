"""The two lowest rungs of the ladder: the file's bytes and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf import gguf_name
from pipeline.errors import InputError, UnsupportedError
from pipeline.report import Gate
from pipeline.stages.load import Source
from pipeline.stages.stored import digest
from runtimes import llamacpp
from runtimes.ggml_emulator import GGMLEmulator
from runtimes.gguf_tokenizer import build_tokenizer
from runtimes.gguf_weights import GGUFWeights

EVALUATION_CHARACTERS = 20_000
"""How much of the evaluation text the tokenizers must agree on, besides `TORTURE`."""

TORTURE = (
    "Hello world! it's we'll I'D they'Ve 'tis\n"
    "0 12 345 6789 3.14159 1e-9 0xFFee 2026-11-22 ½ Ⅷ ٣٤\n"
    "  leading and trailing  \n\n\n\ttabs\t\tand \r\n line ends\r"
    "naïve café Straße Ωμέγα привет мир שלום עולם مرحبا 你好，世界 "
    "こんにちは 안녕하세요 ไทย हिन्दी\n"
    "👩‍👩‍👧‍👦 🇺🇳 😀👍🏽 ∑∫√≠ → ← ✓ \u200b\u00a0\u2003\ufeff\n"
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # __init__ snake_case camelCase\n"
    '[INST] {{ jinja }} {% raw %} \\n \\x00 "quotes" `ticks` '
    "~!@#$%^&*()_+-=[]{}|;:,.<>?/\n"
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa AAAAAAAAAAAA .............. ------ ======"
)
"""Text on which tokenizers like to differ. It is in NFC: llama.cpp does not normalize, and where a
tokenizer does, `Vocabulary.notes` says so."""


def bytes_gates(weights: GGUFWeights, promised: Mapping[str, Any], source: Source) -> list[Gate]:
    """Decode every tensor of the file and compare with the solver's weights.

    Args:
        weights: The file.
        promised: Type and SHA-256 of the float32 weights by GGUF name.
        source: Says which tensors there must be.
    """
    expected = {gguf_name(name) for name in source.shapes}
    if expected != set(promised):
        odd = sorted(expected ^ set(promised))
        return [identity_gate("bytes", "manifest", len(expected), odd)]
    own, library = _differing(weights, promised)
    return [
        identity_gate("bytes", "this project's decoder", len(promised), own),
        identity_gate("bytes", "gguf.quants", len(promised), library),
    ]


def _differing(
    weights: GGUFWeights, promised: Mapping[str, Any]
) -> tuple[list[str], list[str] | str]:
    """Tensors that decode to something else, by our decoder and by the gguf package's."""
    import gguf

    own: list[str] = [name for name in promised if name not in set(weights.names())]
    library: list[str] = list(own)
    unknown: set[str] = set()
    for name, promise in promised.items():
        if name in own:
            continue
        kind = weights.type_of(name)
        if kind != promise["type"] or digest(weights.decode(name)) != promise["sha256_float32"]:
            own.append(name)
        known = getattr(gguf.GGMLQuantizationType, kind, None)
        if known is None:
            unknown.add(kind)
            continue
        try:
            decoded = _by_library(weights.raw(name), known) * np.float32(weights.tensor_scale(name))
        except NotImplementedError:
            unknown.add(kind)
            continue
        if digest(decoded) != promise["sha256_float32"]:
            library.append(name)
    if unknown and not library:
        return own, f"the installed gguf package does not know {', '.join(sorted(unknown))}"
    return own, library


def _by_library(raw: np.ndarray, kind: Any) -> np.ndarray:
    import gguf.quants

    return np.asarray(gguf.quants.dequantize(raw, kind), dtype=np.float32)


def identity_gate(level: str, runtime: str, count: int, differing: list[str] | str) -> Gate:
    """The verdict on things that must be the same.

    Args:
        level: ``bytes`` or ``tokens``.
        runtime: What looked at them.
        count: How many there are.
        differing: Names of those that differ, or why none was looked at.
    """
    claim = {
        "bytes": f"{count} tensors decode to the solver's weights, bit for bit",
        "tokens": "the file's tokenizer gives the reference's ids",
    }[level]
    if isinstance(differing, str):
        return Gate(level, claim, runtime, None, "identical", "not run", differing)
    if differing:
        detail = f"differs: {', '.join(differing[:3])}"
        return Gate(level, claim, runtime, f"{len(differing)} differ", "identical", "red", detail)
    return Gate(level, claim, runtime, "identical", "identical", "green")


def tokenizer_texts(source: Source, evaluation: str) -> dict[str, str]:
    """Texts by name on which a file's tokenizer must agree with the checkpoint's.

    Special tokens inside text are left out where the vocabulary is known to deviate.
    """
    texts = {"torture text": TORTURE, "evaluation text": evaluation[:EVALUATION_CHARACTERS]}
    if source.gguf_vocabulary is None or not source.gguf_vocabulary.notes:
        added = source.tokenizer.added_tokens_decoder.values()
        texts["special tokens"] = "a".join(f" {token.content} b{token.content}" for token in added)
    return texts


def differing_texts(
    source: Source, texts: Mapping[str, str], tokenize: Callable[[str], list[int]]
) -> list[str]:
    """Names of the texts that `tokenize` takes apart differently from the checkpoint."""
    return [
        name
        for name, text in texts.items()
        if tokenize(text) != source.tokenizer(text, verbose=False).input_ids
    ]


def check_tokenizer(source: Source, evaluation: str) -> None:
    """Refuse a tokenizer or text that the tokens gate would find different, before any work.

    Raises:
        UnsupportedError: The file's tokenizer would give other ids.
        InputError: Only on the evaluation text, which the tokenizer normalizes and llama.cpp not.
    """
    rebuilt = build_tokenizer(
        {
            entry.key: list(entry.value) if isinstance(entry.value, tuple) else entry.value
            for entry in source.vocabulary.metadata()
        }
    )
    texts = tokenizer_texts(source, evaluation)
    wrong = differing_texts(source, texts, lambda text: list(rebuilt.encode(text).ids))
    if wrong == ["evaluation text"] and source.vocabulary.notes:
        raise InputError(
            "llama.cpp would give the evaluation text other token ids than the checkpoint",
            why=source.vocabulary.notes[0],
            fix="normalize the text (NFC), or choose another with --evaluation",
        )
    if wrong:
        raise UnsupportedError(
            "the tokenizer cannot be represented in GGUF",
            why=f"rules {source.vocabulary.pre!r} give other ids for: {', '.join(wrong)}",
        )


def tokens_gates(path: Path, source: Source, evaluation: str, stock: bool) -> list[Gate]:
    """Compare the tokenizer in the file with the checkpoint's.

    Args:
        path: GGUF file.
        source: The reference.
        evaluation: Evaluation text, of which the beginning is compared too.
        stock: Whether llama.cpp is to be asked as well.
    """
    texts = tokenizer_texts(source, evaluation)

    def gate(runtime: str, tokenize: Callable[[str], list[int]]) -> Gate:
        wrong = differing_texts(source, texts, tokenize)
        return identity_gate("tokens", runtime, len(texts), wrong)

    with GGMLEmulator(path) as emulator:
        gates = [gate("ggml emulator", emulator.tokenize)]
    if stock:
        with llamacpp.LlamaCpp(path) as runner:
            gates.append(gate("llama.cpp", runner.tokenize))
    return gates
