"""Floating-point formats with fp16 scales: levels, exact decoding, exact scales, every method."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from pipeline.errors import UnsupportedError
from pipeline.quantization.formats import E4M3_LEVELS, QuantizedTensor, get_format
from pipeline.quantization.layer import LayerOptions, Rounding, Scales, quantize_layer
from tests.pipeline.quantization.problems import energy
from tests.pipeline.quantization.test_float_zeros import PAIRS
from tests.pipeline.quantization.test_piso import TINY, TINY_POINTS, energies, problem, sweep
from tests.pipeline.quantization.test_zero_points import problem as layer

NAMES = ("FP4_G16", "FP8_G16")


@pytest.mark.parametrize(("name", "bits"), [("fp4_g32", 4), ("FP8_G64", 8)])
def test_the_format(name: str, bits: int) -> None:
    fmt = get_format(name)
    assert fmt.name == name.upper()
    assert fmt.levels[-fmt.code_min] == 0
    assert fmt.levels == tuple(-level for level in reversed(fmt.levels))
    assert fmt.bits_per_weight == bits + 16 / fmt.group_size
    assert not fmt.affine
    assert get_format("FP4_G32").levels == get_format("MXFP4").levels


@pytest.mark.parametrize("name", ["FP4", "FP8", "FP4_G0", "FP5_G32", "FP6_G32", "FP16_G32"])
def test_widths_that_there_are_not(name: str) -> None:
    with pytest.raises(UnsupportedError, match="unknown type"):
        get_format(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_scale_and_code_dequantizes_exactly(name: str) -> None:
    """Against another library's decoder in float64: 11 and 4 significant bits fit into 24."""
    fmt = get_format(name)
    scales = torch.tensor([2.0**-24, 1023 * 2.0**-24, 0.1, 1.0009765625, 65504.0]).half().float()
    places = np.arange(len(fmt.levels)) - len(fmt.levels) // 2
    padded = np.concatenate([places, np.zeros(-len(places) % 16, places.dtype)])
    codes = torch.from_numpy(padded.astype(np.int8)).expand(5, -1)
    groups = codes.shape[1] // 16
    tensor = QuantizedTensor(fmt, codes, {"d": scales[:, None].expand(5, groups).contiguous()})
    numpy, sign, factor = (
        (ml_dtypes.float4_e2m1fn, 8, 2) if name == "FP4_G16" else (ml_dtypes.float8_e4m3fn, 128, 1)
    )
    patterns = (np.abs(padded) + sign * (padded < 0)).astype(np.uint8)
    wanted = scales.double()[:, None].numpy() * (patterns.view(numpy).astype(np.float64) * factor)
    assert np.array_equal(tensor.dequantize().double().numpy(), wanted)


@pytest.mark.parametrize("seed", range(8))
def test_scales_of_e4m3_are_optimal_over_every_point_of_a_coarse_lattice(seed: int) -> None:
    grid = np.array(E4M3_LEVELS)
    w, H, b = problem(seed, np.array([-2.0, -1.0, 0.0, 1.0]))
    factor = 4.0 ** (seed % 6) * 8
    w, b = w * factor, b * factor
    scale, codes, objective = sweep(w, H, b, grid, signed=False, lattice=TINY)
    assert scale in [0.0, *TINY_POINTS]
    assert objective == pytest.approx(min(energies(w, H, b, grid, False)), rel=1e-9, abs=1e-12)
    assert energy(scale * codes, H, b) == pytest.approx(objective, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["FP4_G16", pytest.param("FP8_G16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("rounding", "scales"), PAIRS)
def test_every_pair_of_scales_and_rounding(name: str, rounding: Rounding, scales: Scales) -> None:
    W, objective = layer(rows=6, width=32)
    fmt = get_format(name)
    options = LayerOptions(scales=scales, rounding=rounding, refine_rounds=1)
    found = quantize_layer(W, objective, fmt, options).quantized
    d = found.scales["d"]
    assert torch.equal(d, d.half().float())
    assert found.codes.min() >= fmt.code_min
    assert found.codes.max() <= -fmt.code_min
    assert found.codes.unique().numel() > 8
    again = quantize_layer(W, objective, fmt, options).quantized
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.scales["d"], d)


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_is_ordered(name: str) -> None:
    W, objective = layer(rows=48)
    base = LayerOptions()

    def total(options: LayerOptions) -> float:
        return float(quantize_layer(W, objective, get_format(name), options).loss.sum())

    absmax, mse = total(replace(base, scales="absmax")), total(replace(base, scales="mse"))
    piso, refined = total(base), total(replace(base, refine_rounds=3))
    assert refined < piso < mse < absmax


def test_more_bits_are_better() -> None:
    W, objective = layer(rows=24)
    losses = [
        float(quantize_layer(W, objective, get_format(name), LayerOptions()).loss.sum())
        for name in ("INT8_G32", "FP8_G32", "FP4_G32", "MXFP4")
    ]
    assert losses == sorted(losses)


@pytest.mark.parametrize("name", NAMES)
def test_extremes(name: str) -> None:
    """All zero, one outlier, beyond the largest scale, below the smallest."""
    W, objective = layer(rows=6)
    W[0] = 0
    W[1, 5] = 1e4
    W[2] *= 1e9
    W[3] *= 1e-12
    found = quantize_layer(W, objective, get_format(name), LayerOptions()).quantized
    values = found.dequantize()
    assert values.isfinite().all()
    assert not values[0].any()
    assert values[1, 5] == pytest.approx(1e4, rel=0.05)
    assert values[2].abs().max() == 65504 * found.format.levels[-1]
    assert values[3].abs().max() < 1e-9
