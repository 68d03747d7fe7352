"""Formats with float zero points: what they store, how it decodes, and every way to choose it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch

from pipeline.errors import UnsupportedError
from pipeline.quantization.formats import QuantizedTensor, get_format, stored_pair
from pipeline.quantization.layer import (
    LayerOptions,
    Rounding,
    Scales,
    quantize_free,
    quantize_layer,
)
from pipeline.quantization.scales import BlockProblem, piso
from pipeline.quantization.scales.affine import _best_zeros
from tests.pipeline.quantization.problems import correlated, energy
from tests.pipeline.quantization.test_zero_points import problem

SLOW = pytest.mark.slow

PAIRS = [
    pytest.param(
        rounding,
        scales,
        marks=() if scales == "piso" or (rounding, scales) == ("gptq", "mse") else SLOW,
    )
    for rounding, scales in product(get_args(Rounding), get_args(Scales))
]
"""The rarer pairs take a minute together."""


def zeros_of(quantized: QuantizedTensor) -> torch.Tensor:
    """Zero points by division, which must be numbers of fp16."""
    d, m = quantized.scales["d"].double(), quantized.scales["m"].double()
    assert (m[d == 0] == 0).all()
    zeros = torch.where(d == 0, 0.0, -m / torch.where(d == 0, 1.0, d))
    assert torch.equal(zeros, zeros.half().double())
    assert torch.equal(zeros * 4096, (zeros * 4096).round())
    assert zeros.abs().max() <= 2048
    return zeros


@pytest.mark.parametrize("bits", [2, 4])
def test_the_format(bits: int) -> None:
    fmt = get_format(f"fint{bits}_g32")
    assert fmt.levels == tuple(range(2**bits))
    assert (fmt.group_size, fmt.affine, fmt.zero_points, fmt.scaled_offsets) == (
        *(32, True, False, True),
    )
    assert fmt.bits_per_weight == bits + 1


@pytest.mark.parametrize("name", ["FINT3_G32", "FINT8_G32", "FINT4", "FINT4_G0"])
def test_widths_that_there_are_not(name: str) -> None:
    with pytest.raises(UnsupportedError, match="unknown type"):
        get_format(name)


def test_every_order_of_operations_gives_the_same_bits() -> None:
    """``s (q - z)`` as the runtime may compute it in float32, and as it is stored: one rounding."""
    rng = np.random.default_rng(0)
    fmt = get_format("FINT4_G16")
    zeros = rng.integers(-(1 << 16), 1 << 16, 4000) / 4096.0
    zeros = np.concatenate([zeros, rng.uniform(-2048, 2048, 4000), [2.0**-12, -2048, 0, 15]])
    zeros = fmt.zero_lattice.round(torch.tensor(zeros)).float()
    scales = torch.tensor(rng.uniform(0, 1, len(zeros)) * 2.0 ** rng.integers(-23, 15, len(zeros)))
    scales = fmt.scale_lattice.round(scales).float()
    assert torch.equal(zeros.half().float(), zeros)
    d, codes = scales[:, None], torch.arange(16, dtype=torch.int8).expand(len(zeros), 16)
    tensor = QuantizedTensor(fmt, codes, {"d": d, "m": -d * zeros[:, None]})
    found, q, z = tensor.dequantize(), codes.float(), zeros[:, None]
    exact = d.double() * (q.double() - z.double())
    assert torch.equal(found, exact.float())
    assert torch.equal(found, d * (q - z))
    assert torch.equal(found, d * q - d * z)
    assert (exact != exact.float()).any()


def test_the_nearest_pair_is_stored_and_scales_carry_their_offsets() -> None:
    fmt = get_format("FINT2_G32")
    scale = torch.tensor([0.5, 0.5, 0.0, 1e-7, 0.0])
    offset = torch.tensor([-0.6, 0.3, 0.0, 1.0, -3.0])
    d, m = stored_pair(fmt, scale, offset)
    assert d[:3].tolist() == [0.5, 0.5, 0.0]
    assert m[:2].tolist() == [-0.5 * float(np.float16(1.2)), 0.5 * float(np.float16(0.6))]
    assert m[2] == 0
    for n in (3, 4):
        assert m[n] == pytest.approx(float(offset[n]), rel=1e-3)
        assert abs(m[n] / d[n]) <= 2048


@pytest.mark.parametrize("seed", range(12))
def test_for_fixed_codes_no_pair_around_is_better(seed: int) -> None:
    """Against all pairs of 401 scales and 15 zero points around the fitted pair."""
    fmt, rng = get_format("FINT2_G8"), np.random.default_rng(seed)
    X = correlated(rng, 8)
    M, target = X.T @ X, rng.standard_t(4, 8) + 3 * (seed % 3)
    b, codes = target @ M, rng.integers(0, 4, 8)
    codes[:2] = 0, 3
    basis = np.stack([codes, np.ones(8)])
    fitted, middle = np.linalg.solve(basis @ M @ basis.T, basis @ b)
    if fitted < 0:
        codes, fitted, middle = 3 - codes, -fitted, middle + 3 * fitted
    scale, offset, _, objective = _best_zeros(
        torch.tensor(M), torch.tensor(b)[None], torch.tensor(codes)[None], fmt
    )
    s, m = scale.item(), offset.item()
    assert energy(s * codes + m, M, b) == pytest.approx(objective.item(), rel=1e-9)
    step = float(np.spacing(np.float16(fitted)))
    scales = {float(np.float16(fitted + k * step)) for k in range(-200, 201)}
    centre = np.float16(-middle / fitted)
    zeros = {float(centre + np.float16(k) * abs(np.spacing(centre))) for k in range(-7, 8)}
    best = min(energy(x * (codes - z), M, b) for x, z in product(scales, zeros) if x > 0)
    assert objective.item() <= best + 1e-12 * abs(best)


@pytest.mark.parametrize("seed", range(4))
def test_small_groups_come_near_the_best_of_a_scan(seed: int) -> None:
    """Against nearest codes at 120 x 160 scales and zero points."""
    fmt, rng = get_format("FINT2_G8"), np.random.default_rng(seed)
    X = correlated(rng, 8)
    M, w = X.T @ X, rng.standard_t(5, 8) + 1
    weights = torch.tensor(w)[None]
    found = piso(BlockProblem(weights, torch.tensor(M)), fmt)
    s, m = found.scale.item(), found.offset.item()
    codes = found.level_indices[0].numpy()
    reached = energy(s * codes + m, M, w @ M)
    spread = w.max() - w.min()
    best = min(
        energy(scale * np.clip(np.round(w / scale + zero), 0, 3) - scale * zero, M, w @ M)
        for scale in spread * np.linspace(0.1, 0.6, 120)
        for zero in np.linspace(-4, 5, 160)
    )
    total = abs(energy(np.zeros(8), M, w @ M) - best) + abs(best)
    assert reached <= best + 1e-6 * total


@pytest.mark.parametrize(("rounding", "scales"), PAIRS)
def test_every_pair_of_scales_and_rounding(rounding: Rounding, scales: Scales) -> None:
    W, objective = problem(rows=6, width=32)
    fmt = get_format("FINT2_G16")
    options = LayerOptions(scales=scales, rounding=rounding, refine_rounds=2)
    found = quantize_layer(W, objective, fmt, options).quantized
    d = found.scales["d"]
    assert torch.equal(d, d.half().float())
    assert (d >= 0).all()
    zeros = zeros_of(found)
    assert not torch.equal(zeros, zeros.round())
    assert found.codes.min() >= 0
    assert found.codes.max() <= 3
    again = quantize_layer(W, objective, fmt, options).quantized
    assert all(torch.equal(again.scales[n], found.scales[n]) for n in ("d", "m"))


@pytest.mark.parametrize("bits", [2, 4])
def test_the_chain_is_ordered_and_free_zero_points_beat_integers(bits: int) -> None:
    W, objective = problem(rows=24)
    base = LayerOptions()

    def total(options: LayerOptions, name: str = f"FINT{bits}_G16") -> float:
        return float(quantize_layer(W, objective, get_format(name), options).loss.sum())

    absmax, mse = total(replace(base, scales="absmax")), total(replace(base, scales="mse"))
    found, refined = total(base), total(replace(base, refine_rounds=4))
    assert refined < found < mse < absmax
    assert refined < total(replace(base, refine_rounds=4), f"UINT{bits}_G16")
    assert refined < total(replace(base, refine_rounds=4), f"INT{bits}_G16")


@pytest.mark.parametrize("scales", ["absmax", "piso"])
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-6, 100.0])
def test_groups_of_equal_weights_are_kept(scales: str, value: float) -> None:
    W = torch.full((3, 32), value, dtype=torch.float64)
    W[1] += 1e-6 * torch.randn(32, generator=torch.Generator().manual_seed(0)) * value
    found = quantize_free(W, get_format("FINT4_G16"), scales)  # type: ignore[arg-type]
    zeros_of(found)
    torch.testing.assert_close(found.dequantize().double(), W, rtol=6e-3, atol=0)
