"""Stopping the sweep early changes nothing but the work."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.kernels import piso_sweep
from pipeline.kernels import sweep as dispatcher
from pipeline.kernels.cpu import sweep as compiled
from pipeline.kernels.twin import sweep as twin
from pipeline.quantization.formats import FP16
from tests.pipeline.quantization.problems import GRIDS, correlated, weights

EXACT = (53, -1074, float("inf"))
HALF = (FP16.significand_bits, FP16.min_step_exponent, FP16.max_value)


def problem(seed: int, rows: int = 12):
    """Rows of every kind; H well or badly conditioned, or singular; b with and without mismatch."""
    rng = np.random.default_rng(seed)
    width = int(rng.integers(2, 40))
    tokens = max(1, width // 2) if seed % 4 == 3 else 3 * width
    X = correlated(rng, width, tokens)
    if seed % 4 == 2:
        X[:, 0] = X[:, 1] * (1 + 1e-7)
    W = np.stack([weights(rng, width, kind % 5) for kind in range(rows)])
    H = X.T @ X
    noise = 0.3 * rng.standard_normal(W.shape) if seed % 2 else 0
    return torch.tensor(W), torch.tensor(H), torch.tensor((W + noise) @ H)


def disabled(linear: torch.Tensor) -> torch.Tensor:
    return torch.full_like(linear[:, 0], -1)


def run_compiled(W, H, b, grid, limits, ceiling, signed=True, clamp=True):
    arrays = (t.numpy() for t in (W, H, b, torch.tensor(grid)))
    return compiled.piso_sweep(*arrays, signed, clamp, *limits, ceiling.numpy())


@pytest.mark.parametrize("limits", [EXACT, HALF])
@pytest.mark.parametrize("name", GRIDS)
def test_results_are_the_same_bits(name: str, limits) -> None:
    pruned = 0
    for seed in range(16):
        W, H, b = problem(seed)
        ceiling = dispatcher._ceiling(H, b)
        everything = run_compiled(W, H, b, GRIDS[name], limits, disabled(b))
        for top in (ceiling, torch.full_like(ceiling, float("inf"))):
            got = run_compiled(W, H, b, GRIDS[name], limits, top)
            for expected, value in zip(everything[:3], got[:3], strict=True):
                np.testing.assert_array_equal(value, expected)
            pruned += int((everything[3] - got[3]).sum())
    assert pruned > 0


@pytest.mark.parametrize("name", ["int2", "int3", "q2_0", "half levels", "fp4"])
def test_results_of_the_twin_are_the_same_bits(name: str) -> None:
    """Row by row: together it would go on until the last of them is done."""
    grid = torch.tensor(GRIDS[name])
    for seed in range(12):
        W, H, b = problem(seed, rows=3)
        ceiling = dispatcher._ceiling(H, b)
        everything = twin.piso_sweep(W, H, b, grid, True, True, *HALF)
        for r in range(3):
            row = slice(r, r + 1)
            arguments = (W[row], H, b[row], grid, True, True, *HALF)
            for expected, value in zip(
                everything, twin.piso_sweep(*arguments, ceiling[row]), strict=True
            ):
                assert torch.equal(value, expected[row])


@pytest.mark.parametrize("name", ["int2", "int4", "half levels", "iq4_nl"])
def test_the_bound_of_the_twin_holds_just_as_far(name: str) -> None:
    """Against the formula of the proof, spelled out per row."""
    grid = GRIDS[name]
    for seed in range(8):
        W, H, b = problem(seed)
        levels = torch.tensor(grid)
        start = twin.transitions(W, levels)[3]
        K = (b * torch.linalg.lstsq(H, b.T).solution.T).sum(1) * 1.001
        bound = twin._Bound(W, b, levels, start, K)
        radius = max(np.diff(grid).max() / 2, np.abs(grid).min())
        for s in (0.01, 0.05, 0.1, 0.3):
            got = bound.hopeless(torch.full_like(K, s), -0.5 * K)
            for r in range(len(W)):
                first = grid[start[r].numpy()]
                side = np.where(W[r] > 0, grid[-1], np.where(W[r] < 0, grid[0], first))
                products = np.stack(
                    [np.zeros(len(first)), first * b[r].numpy(), side * b[r].numpy()]
                )
                near = np.abs(b[r].numpy()) * (np.abs(W[r].numpy()) + s * radius)
                reach = np.minimum(s * products.max(0), near).sum()
                below = reach < K[r] and reach**2 / K[r] - 2 * reach >= -0.5 * K[r]
                assert bool(got[r]) == bool(below)


def gaussian(width: int, rows: int):
    rng = np.random.default_rng(width)
    X = correlated(rng, width, 4 * width)
    W = torch.tensor(rng.standard_normal((rows, width)))
    return W, torch.tensor(X.T @ X), W @ torch.tensor(X.T @ X)


def test_a_fair_part_of_the_work_is_saved() -> None:
    """Unpruned, every pair of a weight and a midpoint of its sign is walked, in both signs."""
    W, H, b = gaussian(32, rows=50)
    for name, least in (("int2", 0.04), ("int3", 0.12), ("int4", 0.2)):
        grid = GRIDS[name]
        everything = run_compiled(W, H, b, grid, HALF, disabled(b))[3]
        pruned = run_compiled(W, H, b, grid, HALF, dispatcher._ceiling(H, b))[3]
        midpoints = (grid[1:] + grid[:-1]) / 2
        pairs = (W.numpy()[:, :, None] * np.concatenate([midpoints, -midpoints]) > 0).sum((1, 2))
        np.testing.assert_array_equal(everything, pairs)
        assert pruned.sum() < (1 - least) * everything.sum()


def test_the_twin_stops_once_no_row_can_improve(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H, b = gaussian(32, rows=1)
    calls = []
    plain = twin.lattice_candidates
    monkeypatch.setattr(twin, "lattice_candidates", lambda *a: calls.append(1) or plain(*a))
    grid = torch.tensor(GRIDS["int4"])
    twin.piso_sweep(W, H, b, grid, False, True, *HALF)
    unpruned = len(calls)
    twin.piso_sweep(W, H, b, grid, False, True, *HALF, dispatcher._ceiling(H, b))
    assert len(calls) - unpruned < 0.9 * unpruned


def test_the_ceiling_is_the_largest_decrease() -> None:
    _, H, b = gaussian(16, rows=6)
    exact = (b * torch.linalg.solve(H, b.T).T).sum(1)
    ceiling = dispatcher._ceiling(H, b)
    assert (ceiling > exact).all()
    assert (ceiling < exact * 1.01).all()


def test_a_singular_hessian_has_no_ceiling() -> None:
    b = torch.ones(2, 3, dtype=torch.float64)
    for H in (torch.zeros(3, 3), torch.ones(3, 3), torch.diag(torch.tensor([1.0, 1.0, 1e-12]))):
        assert dispatcher._ceiling(H.double(), b).isinf().all()


def test_the_energy_bounds_the_largest_decrease_of_any_hessian() -> None:
    """No inverse is needed, so that it holds for singular H; close for others."""
    for seed in range(16):
        W, H, _ = problem(seed)
        energy = ((W @ H) * W).sum(1)
        ceiling = dispatcher._energy(W, H, W @ H)
        assert (ceiling >= energy).all()
        assert (ceiling <= energy * 1.01 + 1e-9 * (W.abs() @ H.diagonal().sqrt()).square()).all()


def test_the_energy_keeps_every_bit_of_the_results() -> None:
    pruned = 0
    for seed in range(16):
        W, H, _ = problem(seed)
        b = W @ H
        for name in GRIDS:
            everything = run_compiled(W, H, b, GRIDS[name], HALF, disabled(b))
            ceiling = dispatcher._energy(W, H, b)
            got = run_compiled(W, H, b, GRIDS[name], HALF, ceiling)
            pruned += int((everything[3] - got[3]).sum())
            given = piso_sweep(W, H, None, torch.tensor(GRIDS[name]), signed=True, lattice=FP16)
            for expected, value, other in zip(everything[:3], got[:3], fields(given), strict=True):
                np.testing.assert_array_equal(value, expected)
                np.testing.assert_array_equal(other, expected)
    assert pruned > 0


def fields(result) -> tuple[torch.Tensor, ...]:
    return result.scales, result.level_indices, result.objective


def test_a_free_scale_is_not_pruned() -> None:
    """Its codes come from small scales, but the scale that is fitted to them may be large."""
    for seed in range(20):
        W, H, b = problem(seed)
        for name in ("int2", "int3"):
            got = piso_sweep(W, H, b, torch.tensor(GRIDS[name]), signed=True, clamp=False)
            expected = run_compiled(W, H, b, GRIDS[name], EXACT, disabled(b), clamp=False)
            np.testing.assert_array_equal(got.objective.numpy(), expected[2])
