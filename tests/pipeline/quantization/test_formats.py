"""Lattices against PyTorch's own types, and what a format promises about its storage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.errors import UnsupportedError
from pipeline.quantization.formats import (
    BF16,
    FP16,
    FP32,
    GGML_FORMATS,
    QuantizedTensor,
    get_format,
)


def samples() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20000, generator=generator, dtype=torch.float64)
    return values * torch.logspace(-9, 4.5, 20000, dtype=torch.float64)


@pytest.mark.parametrize(
    ("lattice", "dtype"), [(FP16, torch.float16), (BF16, torch.bfloat16), (FP32, torch.float32)]
)
def test_rounding_is_that_of_the_storage_type(lattice, dtype) -> None:
    values = samples()
    # PyTorch rounds double to bfloat16 through float32; start from values that survive that.
    values = values.float().double().clamp(-lattice.max_value, lattice.max_value)
    assert torch.equal(lattice.round(values), values.to(dtype).double())


def test_neighbours_bracket_and_touch() -> None:
    values = samples().clamp(-65504, 65504)
    below, above = FP16.neighbours(values)
    assert (below <= values).all()
    assert (values <= above).all()
    as_half = below.numpy().astype(np.float16)
    np.testing.assert_array_equal(as_half.astype(np.float64), below.numpy())
    with np.errstate(over="ignore"):
        step_up = np.nextafter(as_half, np.float16(np.inf)).astype(np.float64)
    exact = below == above
    assert (step_up[~exact.numpy()] == above.numpy()[~exact.numpy()]).all()


def test_values_beyond_the_range_are_clamped() -> None:
    assert FP16.round(torch.tensor([1e6, -1e6])).tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize(
    ("name", "bits"),
    [("Q2_0", 2.25), ("Q4_0", 4.5), ("Q4_1", 5.0), ("Q5_0", 5.5), ("Q8_0", 8.5), ("Q6_K", 6.5625)],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    fmt = GGML_FORMATS[name]
    assert fmt.bits_per_weight == bits
    fields = 1 + fmt.affine
    sub_bits = 8 * fmt.super_group // fmt.group_size if fmt.sub_scale else 0
    stored = math.log2(len(fmt.levels) + (len(fmt.levels) % 2)) * fmt.super_group
    assert (stored + 16 * fields + sub_bits) / fmt.super_group == bits


@pytest.mark.parametrize(
    ("name", "bits", "entries"),
    [
        *(("IQ2_XXS", 2.0625, 256), ("IQ2_XS", 2.3125, 512), ("IQ2_S", 2.5625, 1024)),
        *(("IQ3_XXS", 3.0625, 256), ("IQ3_S", 3.4375, 512)),
    ],
)
def test_bits_per_weight_of_codebooks(name: str, bits: float, entries: int) -> None:
    fmt = GGML_FORMATS[name]
    vectors, places = fmt.codebook.entries.shape
    assert (fmt.bits_per_weight, vectors) == (bits, entries)
    of_vectors = math.log2(vectors) / places
    signs = 7 / 8 if fmt.codebook.even else 1
    assert of_vectors + signs + 4 / fmt.group_size + 16 / 256 == bits


@pytest.mark.parametrize("name", [name for name, fmt in GGML_FORMATS.items() if fmt.codebook])
def test_the_prefix_tree_holds_the_entries_and_nothing_else(name: str) -> None:
    fmt = GGML_FORMATS[name]
    codebook, n = fmt.codebook, len(fmt.codebook.magnitudes)
    assert fmt.levels[:n] == tuple(-level for level in reversed(fmt.levels[n:]))
    assert np.ptp(np.array(fmt.levels[n:]) / codebook.magnitudes) == 0
    children, places = codebook.children.tolist(), codebook.entries.shape[1]
    paths = [((), 0)]
    for _ in range(places):
        paths = [
            ((*path, m), child)
            for path, node in paths
            for m, child in enumerate(children[node])
            if child >= 0
        ]
    assert {child for _, child in paths} == {0}
    assert [path for path, _ in paths] == sorted(map(tuple, codebook.entries.tolist()))


def test_research_formats_are_parsed() -> None:
    fmt = get_format("int3_g128")
    assert (fmt.levels[0], fmt.levels[-1], fmt.group_size) == (-4, 3, 128)
    assert get_format("INT2").group_of(96) == 96


@pytest.mark.parametrize("name", ["Q4_X", "INT9", "INT4_G0", "INT1_G32", ""])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnsupportedError, match="unknown type") as caught:
        get_format(name)
    assert "Q4_0" in caught.value.fix


def test_dequantization_by_hand() -> None:
    affine = QuantizedTensor(
        get_format("Q4_1"),
        torch.tensor([[0, 15] * 16], dtype=torch.int8),
        {"d": torch.tensor([[0.5]]), "m": torch.tensor([[-2.0]])},
    )
    assert affine.dequantize()[0, :2].tolist() == [-2.0, 5.5]
    scales = torch.arange(-8, 8, dtype=torch.int8)[None]
    deep = QuantizedTensor(
        get_format("Q6_K"),
        torch.full((1, 256), -3, dtype=torch.int8),
        {"d": torch.tensor([[0.25]]), "sc": scales},
    )
    expected = (-3 * 0.25 * scales.float()).repeat_interleave(16, dim=1)
    assert torch.equal(deep.dequantize(), expected)
