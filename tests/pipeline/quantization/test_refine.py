"""Refinement against explicit least squares, explicit descent and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pipeline.kernels import descend, fit_free
from pipeline.kernels.twin import descent as twin
from pipeline.quantization import refine as module
from pipeline.quantization.formats import FP16, QuantizedTensor, get_format
from pipeline.quantization.layer import LayerOptions, quantize_layer
from pipeline.quantization.objective import HeldOut
from pipeline.quantization.refine import refine
from tests.pipeline.quantization.problems import GRIDS, correlated, energy
from tests.pipeline.quantization.test_sequential import layer

FORMATS = [
    *("Q2_0", "Q4_0", "Q4_1", "Q6_K", "INT3_G32", "INT2"),
    *("Q2_K", "Q4_K", "IQ4_XS", "MXFP4", "NVFP4"),
]


def block(seed: int, rows: int, width: int, grid: np.ndarray):
    """Random codes and scales, a metric and linear terms; some rows are degenerate."""
    rng = np.random.default_rng(seed)
    X = correlated(rng, width)
    H = X.T @ X
    indices = rng.integers(0, len(grid), (rows, width))
    scales = rng.uniform(-0.5, 1.0, (rows, 1))
    linear = rng.standard_t(4, (rows, width)) @ H
    scales[0] = 0
    linear[1] = 0
    linear[2] = linear[2, 0]
    return indices, scales, linear, H


def solved(name: str, seed: int = 4, rows: int = 24, width: int = 256):
    W, objective = layer(seed, rows=rows, width=width, tokens=900)
    fmt = get_format(name)
    result = quantize_layer(W, objective, fmt, LayerOptions(mismatch=0))
    return W.double(), objective, result.quantized


@pytest.mark.parametrize("name", ["int2", "int4", "fp4", "iq4_nl"])
def test_descent_equals_an_explicit_one(name: str) -> None:
    grid = GRIDS[name]
    indices, scales, linear, H = block(0, 12, 16, grid)
    offsets = np.full_like(scales, 0.1)
    values = scales * grid[indices] + offsets
    residual = linear - values @ H
    tensors = (torch.tensor(a) for a in (indices, scales, offsets, residual, H, grid))
    found, delta = descend(*tensors, 16)
    for r in range(12):
        v = values[r].copy()
        for i in range(16):
            if scales[r, 0] == 0:
                continue
            tries = np.tile(v, (len(grid), 1))
            tries[:, i] = scales[r, 0] * grid + offsets[r, 0]
            losses = np.array([energy(t, H, linear[r]) for t in tries])
            if losses.min() < energy(v, H, linear[r]) * (1 - 1e-12) - 1e-12:
                v = tries[losses.argmin()]
        np.testing.assert_allclose(values[r] + delta[r].numpy(), v, rtol=1e-9, atol=1e-12)
        moved = scales[r] * grid[found[r].numpy()] + offsets[r]
        np.testing.assert_allclose(moved, v, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["int2", "q2_0", "fp4", "iq4_nl"])
def test_no_single_move_improves_a_free_fit(name: str, signed: bool) -> None:
    """With the scale eliminated, every one-code change of the result is enumerated."""
    grid = GRIDS[name]
    indices, _, linear, H = block(1, 10, 6, grid)
    options = {"sweeps": 50, "signed": signed, "lattice": FP16}
    tensors = [torch.tensor(a) for a in (indices, linear, H, grid)]
    found = fit_free(*tensors, **options)

    def free(q: np.ndarray, b: np.ndarray) -> float:
        alpha, beta = q @ b, q @ H @ q
        return -(alpha**2) / beta if beta > 0 and (signed or alpha > 0) else 0.0

    for r in range(10):
        codes, scale = grid[found.level_indices[r].numpy()], found.scales[r].item()
        reached = free(codes, linear[r])
        assert energy(scale * codes, H, linear[r]) == pytest.approx(
            found.objective[r].item(), rel=1e-9, abs=1e-9
        )
        assert found.objective[r] >= reached - 1e-9 * abs(reached)
        assert reached <= free(grid[indices[r]], linear[r])
        assert signed or scale >= 0
        assert scale == np.float16(scale)
        for i, level in itertools.product(range(6), grid):
            other = codes.copy()
            other[i] = level
            assert free(other, linear[r]) >= reached * (1 + 1e-9) - 1e-9
        near = np.float16(scale)
        for other in (np.nextafter(near, end) for end in (np.float16(np.inf), np.float16(-np.inf))):
            if signed or other >= 0:
                value = energy(float(other) * codes, H, linear[r])
                assert value >= found.objective[r].item() * (1 + 1e-12) - 1e-12


def test_compiled_descent_and_its_twin_agree_bit_for_bit() -> None:
    for grid in GRIDS.values():
        indices, scales, linear, H = block(2, 30, 32, grid)
        levels = torch.tensor(grid)
        scales = np.repeat(scales, 2, axis=1)
        fixed = [torch.tensor(a) for a in (indices, scales, 0 * scales, linear, H)]
        for got, expected in zip(
            descend(*fixed, levels, 16), twin.descend(*fixed, levels, 16), strict=True
        ):
            assert torch.equal(got, expected)
        for signed in (False, True):
            free = [torch.tensor(a) for a in (indices, linear, H)]
            got = fit_free(*free, levels, sweeps=3, signed=signed, lattice=FP16)
            scale, index, objective = twin.fit_free(*free, levels, 3, 11, -24, 65504.0, signed)
            assert torch.equal(got.level_indices, index)
            torch.testing.assert_close(got.scales, scale, rtol=0, atol=0)
            torch.testing.assert_close(got.objective, objective, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FORMATS)
def test_joint_refit_is_least_squares_over_all_scales(name: str) -> None:
    W, objective, start = solved(name, rows=5)
    fmt, H, width = start.format, objective.hessian, 256
    state = module._State(start, H, W, signed=True)
    basis = state._basis()
    fitted = module._least_squares(basis, H, W, state.block)
    root = np.linalg.cholesky(H.numpy()).T
    blocks = width // state.block
    for r in range(5):
        columns = []
        for kind in basis:
            spread = np.zeros((width, blocks))
            for g in range(blocks):
                part = slice(g * state.block, (g + 1) * state.block)
                spread[part, g] = kind[r, part].numpy()
            columns.append(spread)
        A = root @ np.concatenate(columns, axis=1)
        expected, *_ = np.linalg.lstsq(A, root @ W[r].numpy(), rcond=None)
        got = fitted[r].T.reshape(-1).numpy()
        np.testing.assert_allclose(A @ got, A @ expected, rtol=1e-6, atol=1e-6)
    assert fitted.shape == (5, blocks, 2 if fmt.affine else 1)


@pytest.mark.parametrize("name", FORMATS)
def test_every_round_lowers_the_loss_and_ends_at_a_fixpoint(name: str) -> None:
    W, objective, start = solved(name)
    H = objective.hessian
    kept = {n: value.clone() for n, value in start.scales.items()}
    done = refine(start, H, W, rounds=60, tolerance=0)
    assert all(b <= a for a, b in itertools.pairwise(done.losses))
    assert done.losses[-1] < 0.99 * done.losses[0]
    assert done.losses[-1] == pytest.approx(
        float(objective.loss(done.quantized.dequantize(), W).sum()), rel=1e-6
    )
    assert all(torch.equal(start.scales[n], value) for n, value in kept.items())
    again = refine(done.quantized, H, W, rounds=2, tolerance=0)
    assert again.losses[-1] > again.losses[0] * (1 - 1e-4)
    # No code can be moved alone at the final scales, except to tie.
    values = done.quantized.dequantize().double()
    residual = (W - values) @ H
    group = start.format.group_of(256)
    scale = done.quantized.group_scales().double().repeat_interleave(group, dim=1)
    index, levels = done.quantized.codes.long() - start.format.code_min, start.format.grid
    for other in (index + 1, index - 1):
        reached = other.clamp(0, len(levels) - 1)  # at the ends the step is 0
        step = scale * (levels[reached] - levels[index])
        change = step * (step * H.diagonal() - 2 * residual)
        assert float(change.min()) > -1e-3 * done.losses[-1] / len(W)


def test_one_row_at_a_time_or_all_at_once_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    W, objective, start = solved("Q4_0")
    whole = refine(start, objective.hessian, W, rounds=2).quantized
    monkeypatch.setattr(module, "REFIT_ROWS", 5)
    monkeypatch.setattr(module, "LAZY_COLUMNS", 32)
    parts = refine(start, objective.hessian, W, rounds=2).quantized
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scales["d"], parts.scales["d"])


def test_held_out_loss_decides_what_is_kept() -> None:
    W, objective, start = solved("Q2_0")
    said = iter([5.0, 4.0, 3.0, 3.5, 3.6, 9.0])
    done = refine(start, objective.hessian, W, rounds=5, tolerance=0, held_out=lambda _: next(said))
    assert done.kept == 2
    stopped = refine(start, objective.hessian, W, rounds=2, tolerance=0)
    assert torch.equal(done.quantized.codes, stopped.quantized.codes)
    worse = iter(range(9))
    refused = refine(
        start, objective.hessian, W, rounds=2, tolerance=0, held_out=lambda _: next(worse)
    )
    assert refused.kept == 0
    assert torch.equal(refused.quantized.codes, start.codes)


def test_the_judge_measures_output_errors() -> None:
    rng = np.random.default_rng(0)
    X, Xq, D = rng.standard_normal((3, 50, 8))
    D = D[:, :5]
    W, V, V2 = rng.standard_normal((3, 5, 8))
    moments = [torch.tensor(m) for m in (Xq.T @ Xq, Xq.T @ X, Xq.T @ D)]
    judge = HeldOut(*moments)

    def error(V: np.ndarray) -> float:
        return float(np.square(D + X @ W.T - Xq @ V.T).sum())

    said = judge.loss(torch.tensor(V), torch.tensor(W)) - judge.loss(
        torch.tensor(V2), torch.tensor(W)
    )
    assert said == pytest.approx(error(V) - error(V2), rel=1e-9)


def test_a_step_that_raises_the_loss_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    W, objective, start = solved("Q4_1")

    def wrong(indices, scales, offsets, residual, metric, levels, group):
        return indices, torch.ones_like(residual)

    monkeypatch.setattr(module, "descend", wrong)
    with pytest.raises(ArithmeticError, match="raised the loss"):
        refine(start, objective.hessian, W, rounds=1)


def test_zero_and_dead_rows_stay_finite() -> None:
    W, objective, _ = solved("Q4_0", rows=4)
    W[0] = 0
    zero = QuantizedTensor(
        get_format("Q4_0"),
        torch.zeros(4, 256, dtype=torch.int8),
        {"d": torch.zeros(4, 8)},
    )
    done = refine(zero, objective.hessian, W, rounds=6)
    values = done.quantized.dequantize()
    assert torch.isfinite(values).all()
    assert not values[0].any()
    assert done.losses[-1] < 0.2 * done.losses[0]
