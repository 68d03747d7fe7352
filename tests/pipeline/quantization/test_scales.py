"""Scale rules other than the exact sweep."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from pipeline.kernels import fit_affine, twin
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import quantize_free
from pipeline.quantization.scales import absmax, piso
from pipeline.quantization.scales.absmax import smallest_covering_scale
from tests.pipeline.quantization.problems import correlated
from tests.pipeline.quantization.test_piso import SHARED_ORACLE, needs_oracle


def block(seed: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    X = correlated(rng, width, 6 * width)
    return torch.tensor(rng.standard_t(4, (rows, width))), torch.tensor(X.T @ X)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["Q4_0", "Q2_0", "Q8_0", "INT3_G32"])
def test_the_covering_scale_clips_nothing_and_is_the_smallest(name: str, signed: bool) -> None:
    grid = get_format(name).grid
    W, _ = block(0, 50, 32)
    scale = smallest_covering_scale(W, grid, signed=signed)
    assert signed or (scale > 0).all()

    def clipped(s: torch.Tensor) -> torch.Tensor:
        ratio = W / s[:, None]
        return ((ratio > grid[-1] + 1e-9) | (ratio < grid[0] - 1e-9)).any(1)

    assert not clipped(scale).any()
    assert clipped(scale * 0.999).all()
    if signed:
        assert (clipped(-scale * 0.999)).all()


def test_affine_alternation_matches_its_twin_and_beats_min_max() -> None:
    W, M = block(1, 40, 32)
    W[5] = 0.25
    starts = torch.tensor([(1.0, 0.0), (0.8, 0.5), (0.7, 1.0)], dtype=torch.float64)
    got = fit_affine(W, M, 16, starts, 6)
    expected = twin.fit_affine(W, M, 16, starts, 6)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    fmt = get_format("Q4_1")

    def loss(rule) -> torch.Tensor:
        s = rule(W, M, W @ M, fmt)
        codes = s.level_indices
        if codes is None:
            codes = torch.floor((W - s.offset) / torch.where(s.scale == 0, 1, s.scale) + 0.5)
        error = s.scale * codes.clamp(0, 15) + s.offset - W
        return ((error @ M) * error).sum(1)

    assert loss(piso).sum() < 0.7 * loss(absmax).sum()
    assert (loss(piso) <= loss(absmax) * 1.001 + 1e-9).all()
    assert float(loss(piso)[5]) == pytest.approx(0, abs=1e-9)


@needs_oracle
def test_affine_alternation_is_close_to_the_exact_arrangement_search() -> None:
    spec = importlib.util.spec_from_file_location("piso_oracle", SHARED_ORACLE)
    assert spec is not None
    assert spec.loader is not None
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    from pipeline.quantization.scales.piso import AFFINE_ITERATIONS, AFFINE_STARTS

    starts = torch.tensor(AFFINE_STARTS, dtype=torch.float64)
    exact_sum = found_sum = 0.0
    for seed in range(10):
        W, M = block(10 + seed, 1, 6)
        w, H = W[0].numpy(), M.numpy()
        exact = oracle.piso_affine_exact(w, H, H @ w, 2)[0][0] + w @ H @ w
        found = fit_affine(W, M, 4, starts, AFFINE_ITERATIONS)[3].item()
        assert found >= exact - 1e-9 * abs(exact)
        exact_sum, found_sum = exact_sum + exact, found_sum + found
    assert found_sum < 1.5 * exact_sum


def test_sub_scales_beat_covering_scales_and_survive_extremes() -> None:
    fmt = get_format("Q6_K")
    W, _ = block(2, 20, 256)
    W[0] = 0
    W[1, :16] *= 1e4
    W[2] *= 1e-6
    covering, fitted = quantize_free(W, fmt, "absmax"), quantize_free(W, fmt, "piso")
    error = [(q.dequantize() - W).square().sum(1) for q in (covering, fitted)]
    assert error[1].sum() <= error[0].sum()
    assert torch.isfinite(fitted.dequantize()).all()
    assert not fitted.dequantize()[0].any()
    relative = error[1][3:] / W[3:].square().sum(1)
    assert relative.max() < 1e-3
