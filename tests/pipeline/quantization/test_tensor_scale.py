"""The lattice of NVFP4's scales against PyTorch's FP8, and the scale of the whole tensor."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pipeline.errors import UnsupportedError
from pipeline.kernels import piso_sweep
from pipeline.quantization.formats import GGML_FORMATS, UE4M3, QuantizedTensor, get_format
from pipeline.quantization.layer import LayerOptions, quantize_free, quantize_layer
from pipeline.quantization.refine import refine
from pipeline.quantization.tensor_scale import HEADROOM, fit_tensor_scale, format_for
from tests.pipeline.quantization.problems import correlated, energy, nearest_codes, transitions
from tests.pipeline.quantization.problems import weights as random_weights
from tests.pipeline.quantization.test_sequential import layer

NVFP4 = GGML_FORMATS["NVFP4"]
POINTS = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double() / 2
"""All 127 scales from 0 to 224: E4M3 without sign and without its one NaN, halved."""

METHODS = [
    *({"scales": name} for name in ("absmax", "mse", "proxy", "piso", "lookahead")),
    *({"rounding": name} for name in ("nearest", "groupwise", "gptaq", "qronos", "gpfq")),
    {"interleave": "layer", "passes": 2},
    {"refine_rounds": 3, "orders": 2},
    {"hessian": "diagonal"},
    {"metric": "block", "activation_order": False},
]


def test_the_lattice_holds_the_numbers_of_fp8_and_rounds_as_pytorch_does() -> None:
    assert torch.equal(UE4M3.round(POINTS), POINTS)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(20000, generator=generator, dtype=torch.float64)
    values = (values * torch.logspace(-5, 2.35, 20000, dtype=torch.float64)).clamp_max(224)
    middles = (POINTS[1:] + POINTS[:-1]) / 2  # ties
    for tried in (values, middles, POINTS):
        expected = (2 * tried).float().to(torch.float8_e4m3fn).double() / 2
        assert torch.equal(UE4M3.round(tried), expected)
    assert UE4M3.round(torch.tensor([1e9, -3.0, 233.0])).tolist() == [224.0, 0.0, 224.0]


def test_neighbours_are_those_of_the_list() -> None:
    values = torch.cat([POINTS, (POINTS[1:] * 3 + POINTS[:-1]) / 4, torch.tensor([300.0, -1.0])])
    below, above = UE4M3.neighbours(values)
    for value, low, high in zip(values.tolist(), below.tolist(), above.tolist(), strict=True):
        inside = min(max(value, 0.0), 224.0)
        assert low == POINTS[inside >= POINTS].max()
        assert high == POINTS[inside <= POINTS].min()


@pytest.mark.parametrize("exponent", [-13, 4])
def test_a_tensor_scale_multiplies_every_point(exponent: int) -> None:
    scaled = NVFP4.at_tensor_scale(2.0**exponent)
    assert torch.equal(scaled.scale_lattice.round(POINTS * 2.0**exponent), POINTS * 2.0**exponent)
    values = torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 300
    expected = UE4M3.round(values) * 2.0**exponent
    assert torch.equal(scaled.scale_lattice.round(values * 2.0**exponent), expected)
    assert scaled.at_tensor_scale(1.0) == NVFP4
    for wrong in (3.0, 0.0, -2.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="NVFP4 cannot have the tensor scale"):
            scaled.at_tensor_scale(wrong)
    with pytest.raises(ValueError, match="MXFP4 cannot"):
        get_format("MXFP4").at_tensor_scale(2.0)


def test_what_the_format_says_of_its_storage() -> None:
    """Four groups of 16 in 36 bytes; their scales know nothing of each other."""
    assert (NVFP4.bits_per_weight, NVFP4.group_size, NVFP4.stored_block(640)) == (4.5, 16, 64)
    assert NVFP4.fits(448)
    assert not NVFP4.fits(96)
    W, objective = layer(0, rows=4, width=96, tokens=300)
    with pytest.raises(UnsupportedError, match="stores blocks of 64, which do not divide 96"):
        quantize_layer(W, objective, NVFP4, LayerOptions(mismatch=0))
    assert GGML_FORMATS["Q4_0"].stored_block(64) == 32
    assert get_format("INT4").stored_block(64) == 64


@pytest.mark.parametrize("clamp", [True, False])
def test_piso_is_optimal_over_all_scales(clamp: bool) -> None:
    """Every point of the lattice, from subnormal to beyond the largest, is tried."""
    grid = np.array(NVFP4.levels)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        width, size = int(rng.integers(2, 5)), 8.0 ** (seed % 4 - 2) * (100 if seed == 11 else 1)
        X = correlated(rng, width)
        w, H = size * random_weights(rng, width, seed % 5), X.T @ X
        b = H @ w + 0.05 * size * rng.standard_normal(width)
        best = 0.0
        if clamp:
            pairs = ((s, q) for s in POINTS[1:].tolist() for q in nearest_codes(w, s, grid))
        else:
            marks = [m for m in transitions(w, grid) if m > 0]
            codes = [q for m in marks for q in nearest_codes(w, m, grid)]
            pairs = itertools.product(POINTS[1:].tolist(), codes)
        for s, q in pairs:
            best = min(best, energy(s * q, H, b))
        tensors = (torch.tensor(a) for a in (w[None], H, b[None], grid))
        found = piso_sweep(*tensors, signed=False, lattice=UE4M3, clamp=clamp)
        assert found.scales[0] in POINTS
        assert found.objective[0].item() == pytest.approx(best, rel=1e-9, abs=1e-12 * size**2)


@pytest.mark.parametrize("largest", [1e-25, 2.0**-10, 0.3, 1.0, 2688.0, 5e20])
def test_the_largest_weight_has_headroom_and_no_more_than_twice_of_it(largest: float) -> None:
    W = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) * largest / 2
    W[1, 7] = -largest
    fmt = fit_tensor_scale(NVFP4, W)
    top = fmt.scale_lattice.max_value * fmt.levels[-1]
    assert HEADROOM * largest <= top * (1 + 1e-6)
    assert top < 2 * HEADROOM * largest
    assert fit_tensor_scale(fmt, W) == fmt == format_for("nvfp4", W)


def test_tensors_without_a_largest_weight_and_formats_without_a_tensor_scale() -> None:
    assert fit_tensor_scale(NVFP4, torch.zeros(2, 64)) == NVFP4
    assert fit_tensor_scale(NVFP4, torch.zeros(0, 64)) == NVFP4
    assert format_for("Q4_0", torch.ones(2, 64)) == get_format("Q4_0")
    tiny = fit_tensor_scale(NVFP4, torch.full((1, 64), 1e-40))
    assert tiny.tensor_scale == 2.0**-100
    assert torch.equal(
        quantize_free(torch.zeros(2, 64), NVFP4, "piso").dequantize(), torch.zeros(2, 64)
    )


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_every_method_keeps_to_the_lattice_and_does_not_know_the_unit(options) -> None:
    W, objective = layer(2, rows=8, width=128, tokens=600)
    settings = LayerOptions(**{"mismatch": 0, **options})
    found: list[QuantizedTensor] = []
    for unit in (1.0, 2.0**-9):
        fmt = format_for("NVFP4", W * unit)
        result = quantize_layer(W * unit, objective, fmt, settings)
        found.append(result.quantized)
        assert result.relative_loss < 0.02
        stored = result.quantized.scales["d"].double() / fmt.tensor_scale
        assert torch.isin(stored, POINTS).all()
    one, small = found
    assert torch.equal(one.codes, small.codes)
    assert torch.equal(one.scales["d"] * 2.0**-9, small.scales["d"])
    assert torch.equal(one.dequantize() * 2.0**-9, small.dequantize())


@pytest.mark.parametrize("deviation", [0.02, 0.005])
def test_without_a_tensor_scale_small_weights_are_coarse(deviation: float) -> None:
    W = deviation * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    fitted, plain = (
        (quantize_free(W, fmt, "piso").dequantize() - W).square().mean() / W.square().mean()
        for fmt in (format_for("NVFP4", W), NVFP4)
    )
    assert 0.0064 < fitted < 0.0068
    assert plain > 1.15 * fitted


def test_refinement_from_scales_that_hardly_fit_is_monotone() -> None:
    """Under a tensor scale that is far too small, at whose largest scales everything is clipped."""
    W, objective = layer(3, rows=12, width=128, tokens=500)
    fmt = format_for("NVFP4", W)
    fmt = fmt.at_tensor_scale(fmt.tensor_scale / 16)
    start = quantize_layer(W, objective, fmt, LayerOptions(mismatch=0)).quantized
    assert (start.scales["d"] == fmt.scale_lattice.max_value).any()
    found = refine(start, objective.hessian, W.double(), rounds=6)
    losses = found.losses
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]
    assert torch.isin(found.quantized.scales["d"].double() / fmt.tensor_scale, POINTS).all()
