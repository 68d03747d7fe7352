"""Mixes against llama.cpp's own quantizer: the same type for every matrix."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_models import export, random_model

from pipeline.mixes import ALIASES, BASES, Matrix, base_type, embedding_type, head_type, mix_type
from pipeline.quantization.formats import GGML_FORMATS

CODEBOOKS = ("IQ2_", "IQ3_")
"""llama.cpp takes seconds for a file of these."""

CASES = [
    pytest.param(
        *(name, layers, kv_heads, tied),
        marks=[pytest.mark.slow]
        if name.startswith(CODEBOOKS) and (not tied or name != "IQ2_XS")
        else [],
    )
    for name in BASES
    for layers, kv_heads, tied in ((19, 1, False), (9, 4, True))
    if (layers, name) not in {(19, "IQ4_NL"), (19, "TQ1_0")}
]


def stored_types(path: Path) -> dict[str, str]:
    types = {}
    for tensor in gguf.GGUFReader(path).tensors:
        types[tensor.name] = tensor.tensor_type.name
    return types


def planned(name: str, tensor: str, layers: int, queries_per_key: float, tied: bool) -> str:
    part = tensor.split(".")
    if part[0] == "blk":
        return mix_type(name, Matrix(part[2], int(part[1]), layers, queries_per_key))
    if part[0] == "output" or tied:
        return head_type(name, 256)
    return embedding_type(name)


@pytest.mark.parametrize(("name", "layers", "kv_heads", "tied"), CASES)
def test_every_matrix_has_the_type_that_llama_quantize_gives_it(
    name: str, layers: int, kv_heads: int, tied: bool, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    from runtimes.llamacpp import quantize

    if name in ("Q2_0", "MXFP4", "NVFP4"):
        pytest.skip(
            "the gguf package cannot read it, or llama.cpp has it for experts or not at all"
        )
    model = random_model(
        "llama",
        num_hidden_layers=layers,
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        vocab_size=96,
    )
    source = export(model, tmp_path)
    matrices = [t for t in stored_types(source) if t.endswith("weight") and "norm" not in t]
    importance = {t: np.ones(256, np.float32) for t in matrices if t.startswith("blk")}
    quantize(source, tmp_path / "out.gguf", name, imatrix=importance)
    found = stored_types(tmp_path / "out.gguf")
    expected = {t: planned(name, t, layers, 4 / kv_heads, tied) for t in matrices}
    assert {t: found[t] for t in matrices} == expected


def test_every_base_is_a_known_format_and_aliases_are_mixes() -> None:
    assert set(BASES.values()) <= set(GGML_FORMATS)
    assert {base_type(alias) for alias in ALIASES} == set(ALIASES)
    assert {ALIASES[alias] for alias in ALIASES} <= set(BASES)


def test_heads_of_odd_widths_are_q8_0() -> None:
    assert head_type("Q4_K_M", 896) == "Q8_0"
    assert head_type("Q4_K_M", 512) == "Q6_K"
    assert head_type("Q8_0", 512) == "Q8_0"
