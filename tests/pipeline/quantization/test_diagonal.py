"""The sweep under a diagonal Hessian equals the dense one on a diagonal matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.kernels import piso_sweep, piso_sweep_diagonal
from pipeline.kernels.sweep import lattice_limits
from pipeline.kernels.twin import diagonal as twin
from pipeline.quantization.formats import FP16
from tests.pipeline.quantization.problems import GRIDS, energy
from tests.pipeline.quantization.test_piso import (
    TINY,
    energies,
    needs_oracle,
    problem,
    shared_oracle,
)


def diagonal_problem(seed: int, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, h and b; in odd ones b is not h w, every seventh h has a zero."""
    w, H, b = problem(seed, grid)
    h = np.diag(H).copy()
    if seed % 7 == 0:
        h[0] = 0
    return w, h, b if seed % 2 else h * w


def solve(w, h, b, grid, **options):
    result = piso_sweep_diagonal(*(torch.tensor(a) for a in (w[None], h, b[None], grid)), **options)
    codes = grid[result.level_indices[0].numpy()]
    return result.scales[0].item(), codes, result.objective[0].item()


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("lattice", [None, FP16, TINY])
@pytest.mark.parametrize("name", GRIDS)
def test_equals_the_dense_sweep_on_a_diagonal_matrix(name: str, lattice, clamp: bool) -> None:
    grid = GRIDS[name]
    for seed in range(30):
        w, h, b = diagonal_problem(seed, grid)
        for signed in (False, True):
            options = {"signed": signed, "lattice": lattice, "clamp": clamp}
            scale, codes, objective = solve(w, h, b, grid, **options)
            tensors = (torch.tensor(a) for a in (w[None], np.diag(h), b[None], grid))
            expected = piso_sweep(*tensors, **options).objective.item()
            assert objective == pytest.approx(expected, rel=1e-9, abs=1e-12)
            reached = energy(scale * codes, np.diag(h), b)
            assert reached == pytest.approx(objective, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("name", ["int2", "q2_0", "half levels", "fp4"])
def test_optimal_over_every_point_of_a_coarse_lattice(name: str, clamp: bool) -> None:
    grid = GRIDS[name]
    for seed in range(20):
        w, h, b = diagonal_problem(seed, grid)
        for signed in (False, True):
            found = solve(w, h, b, grid, signed=signed, lattice=TINY, clamp=clamp)[2]
            best = min(energies(w, np.diag(h), b, grid, signed, clamp=clamp))
            assert found == pytest.approx(best, rel=1e-9, abs=1e-12)


@needs_oracle
@pytest.mark.parametrize("clamp", [False, True])
def test_equals_the_shared_oracle(clamp: bool) -> None:
    oracle = shared_oracle()
    for seed in range(20):
        for grid in GRIDS.values():
            w, h, b = diagonal_problem(seed, grid)
            expected, s, q = oracle.piso_diag(w, h, b, grid, clamp)
            scale, codes, objective = solve(w, h, b, grid, signed=False, clamp=clamp)
            assert objective == pytest.approx(expected, rel=1e-9, abs=1e-12)
            reached = energy(scale * codes, np.diag(h), b)
            assert reached == pytest.approx(energy(s * q, np.diag(h), b), rel=1e-9, abs=1e-12)


def test_clamping_changes_nothing_where_only_rounding_separates_v_from_w() -> None:
    for seed in range(0, 30, 2):
        for grid in GRIDS.values():
            w, h, b = diagonal_problem(seed, grid)
            clamped, free = (solve(w, h, b, grid, signed=True, clamp=c)[2] for c in (True, False))
            assert clamped == pytest.approx(free, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("lattice", [None, FP16])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_compiled_and_twin_agree_with_a_diagonal_per_row(
    chunk: int, lattice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "CHUNK_EVENTS", chunk)
    rng = np.random.default_rng(3)
    W = torch.tensor(rng.standard_t(4, (20, 16)))
    W[2], W[3], W[4] = 0.7, torch.round(W[3] * 2) / 2, 0.0
    h, B = torch.tensor(rng.random((20, 16))), W * torch.tensor(rng.random((20, 16)))
    for grid in GRIDS.values():
        levels = torch.tensor(grid)
        for clamp in (False, True):
            got = piso_sweep_diagonal(W, h, B, levels, signed=True, lattice=lattice, clamp=clamp)
            limits = (True, clamp, *lattice_limits(lattice))
            scales, indices, objective = twin.piso_sweep_diagonal(W, h, B, levels, *limits)
            # Equal weights are met exactly by every level, so their best scale is ambiguous.
            clear = torch.arange(20) != 2
            assert torch.equal(got.level_indices[clear], indices[clear])
            torch.testing.assert_close(got.scales[clear], scales[clear], rtol=1e-12, atol=0)
            torch.testing.assert_close(got.objective, objective, rtol=1e-9, atol=0)
            v = scales[:, None] * levels[indices]
            reached = (h * v * v - 2 * B * v).sum(1)
            torch.testing.assert_close(reached, objective, rtol=1e-9, atol=1e-12)
        single = piso_sweep_diagonal(W[7:8], h[7], B[7:8], levels, signed=True)
        everything = piso_sweep_diagonal(W, h, B, levels, signed=True)
        assert torch.equal(single.level_indices[0], everything.level_indices[7])
        assert single.scales[0] == everything.scales[7]


def test_zero_weights_get_scale_zero() -> None:
    scale, codes, objective = solve(
        np.zeros(3), np.ones(3), np.zeros(3), GRIDS["int2"], signed=True
    )
    assert (scale, objective, codes.tolist()) == (0.0, 0.0, [0.0, 0.0, 0.0])


def test_a_diagonal_of_another_shape_is_refused() -> None:
    W, levels = torch.ones(3, 4), torch.tensor([-1.0, 0.0, 1.0])
    for shape in [(3,), (1, 4), (4, 4)]:
        with pytest.raises(InputError, match="Hessian diagonal"):
            piso_sweep_diagonal(W, torch.ones(shape), W, levels, signed=True)
