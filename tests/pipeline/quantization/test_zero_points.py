"""Formats with integer zero points: what they store, and every rule and step that chooses them."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from pipeline.errors import UnsupportedError
from pipeline.quantization.formats import QuantizedTensor, get_format, stored_pair
from pipeline.quantization.layer import LayerOptions, Rounding, Scales, quantize_layer
from pipeline.quantization.objective import LayerObjective
from tests.pipeline.quantization.problems import correlated


def problem(rows: int = 16, width: int = 64) -> tuple[torch.Tensor, LayerObjective]:
    """Weights whose groups do not lie around 0."""
    rng = np.random.default_rng(3)
    X = correlated(rng, width, 500)
    W = torch.tensor(rng.standard_t(5, (rows, width)))
    W += torch.tensor(rng.standard_normal((rows, width // 16))).repeat_interleave(16, dim=1)
    return W, LayerObjective.from_moments(torch.tensor(X.T @ X))


def zeros_of(quantized: QuantizedTensor) -> torch.Tensor:
    """Zero points by division, which must come out whole."""
    d, m = quantized.scales["d"].double(), quantized.scales["m"].double()
    assert (m[d == 0] == 0).all()
    zeros = torch.where(d == 0, 0.0, -m / torch.where(d == 0, 1.0, d))
    assert torch.equal(zeros, zeros.round())
    return zeros


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_format(bits: int) -> None:
    fmt = get_format(f"uint{bits}_g32")
    assert fmt.levels == tuple(range(2**bits))
    assert (fmt.group_size, fmt.code_min, fmt.affine, fmt.zero_points) == (32, 0, True, True)
    assert fmt.bits_per_weight == bits + (16 + bits) / 32
    assert not fmt.signed_scale


@pytest.mark.parametrize("name", ["UINT1_G32", "UINT5_G32", "UINT8_G32", "UINT4_G0"])
def test_widths_that_there_are_not(name: str) -> None:
    with pytest.raises(UnsupportedError, match="unknown type"):
        get_format(name)


def test_every_scale_code_and_zero_point_dequantizes_exactly() -> None:
    """In float32 as in rational arithmetic: fp16 scales times integers of 5 bits."""
    fmt = get_format("UINT4_G16")
    scales = torch.tensor([2.0**-24, 1023 * 2.0**-24, 0.1, 1.0009765625, 65504.0]).half().float()
    for zero in range(16):
        d = scales[:, None]
        codes = torch.arange(16, dtype=torch.int8).expand(5, 16)
        tensor = QuantizedTensor(fmt, codes, {"d": d, "m": -d * zero})
        wanted = scales.double()[:, None] * (torch.arange(16).double() - zero)
        assert torch.equal(tensor.dequantize().double(), wanted)


def test_the_nearest_pair_is_stored() -> None:
    fmt = get_format("UINT2_G32")
    scale = torch.tensor([0.5, 0.5, 0.5, 0.0, 0.1])
    offset = torch.tensor([-0.6, 0.3, -9.0, 1.0, -0.0])
    d, m = stored_pair(fmt, scale, offset)
    assert torch.equal(d, scale.half().float())
    assert m.tolist() == [-0.5, 0.0, -1.5, 0.0, 0.0]
    assert not torch.signbit(m[[1, 3, 4]]).any()


@pytest.mark.parametrize("scales", get_args(Scales))
@pytest.mark.parametrize("rounding", get_args(Rounding))
def test_every_pair_of_scales_and_rounding(rounding: Rounding, scales: Scales) -> None:
    W, objective = problem()
    fmt = get_format("UINT3_G16")
    options = LayerOptions(scales=scales, rounding=rounding, refine_rounds=2)
    found = quantize_layer(W, objective, fmt, options).quantized
    d = found.scales["d"]
    assert torch.equal(d, d.half().float())
    assert (d >= 0).all()
    zeros = zeros_of(found)
    assert zeros.min() >= 0
    assert zeros.max() <= 7
    assert zeros.unique().numel() > 3
    assert found.codes.min() >= 0
    assert found.codes.max() <= 7
    again = quantize_layer(W, objective, fmt, options).quantized
    assert all(torch.equal(again.scales[n], found.scales[n]) for n in ("d", "m"))


def test_the_chain_is_ordered_and_zero_points_pay_where_groups_lie_beside_0() -> None:
    W, objective = problem(rows=48)
    fmt = get_format("UINT2_G16")
    base = LayerOptions()

    def total(options: LayerOptions, name: str = "UINT2_G16") -> float:
        return float(quantize_layer(W, objective, get_format(name), options).loss.sum())

    absmax, mse = total(replace(base, scales="absmax")), total(replace(base, scales="mse"))
    piso, refined = total(base), total(replace(base, refine_rounds=6))
    ahead = total(replace(base, scales="lookahead"))
    assert refined < piso < mse < absmax
    assert ahead < piso
    assert total(replace(base, refine_rounds=6), "INT2_G16") > 1.1 * refined
    assert fmt.zero_points


def test_refitted_scales_keep_their_zero_points() -> None:
    """With codes that descent cannot improve, only scales move."""
    W, objective = problem()
    fmt = get_format("UINT4_G16")
    start = quantize_layer(W, objective, fmt, LayerOptions(scales="absmax", rounding="nearest"))
    after = quantize_layer(
        W, objective, fmt, LayerOptions(scales="absmax", rounding="nearest", refine_rounds=3)
    )
    assert torch.equal(zeros_of(start.quantized), zeros_of(after.quantized))
    assert not torch.equal(start.quantized.scales["d"], after.quantized.scales["d"])
    assert after.loss.sum() < start.loss.sum()
