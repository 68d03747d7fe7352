"""PiSO is the global optimum, over the reals and over a storage lattice."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from pipeline.kernels import piso_sweep
from pipeline.kernels.twin import sweep as twin
from pipeline.quantization.formats import ScaleLattice
from tests.pipeline.quantization.problems import (
    GRIDS,
    correlated,
    energy,
    nearest_codes,
    scan,
    transitions,
    weights,
)

SHARED_ORACLE = Path(__file__).parents[4] / "shared" / "notes" / "piso_oracle.py"
needs_oracle = pytest.mark.skipif(not SHARED_ORACLE.exists(), reason="no shared notes here")


def shared_oracle() -> ModuleType:
    """The slow numpy oracle that the notes hold."""
    spec = importlib.util.spec_from_file_location("piso_oracle", SHARED_ORACLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem(seed: int, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, H and b; every third problem has G = H, the others a mismatched stream.

    Where zero is a midpoint of the grid, a zero weight has two nearest levels at every scale and
    the problem is not defined: such weights become a half.
    """
    rng = np.random.default_rng(seed)
    width = int(rng.integers(2, 8))
    X = correlated(rng, width)
    noise = 0.2 * np.abs(X).mean() * rng.standard_normal(X.shape)
    Xq = X if seed % 3 == 0 else X + noise
    w = weights(rng, width, seed % 5)
    if 0 in (grid[1:] + grid[:-1]):
        w[w == 0] = 0.5
    return w, Xq.T @ Xq, Xq.T @ X @ w


def sweep(w, H, b, grid, **options):
    result = piso_sweep(*(torch.tensor(a) for a in (w[None], H, b[None], grid)), **options)
    scale, codes = result.scales[0].item(), grid[result.level_indices[0].numpy()]
    return scale, codes, result.objective[0].item()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_never_worse_than_a_scan_of_scales(name: str, signed: bool) -> None:
    grid = GRIDS[name]
    for seed in range(12):
        w, H, b = problem(seed, grid)
        scale, codes, objective = sweep(w, H, b, grid, signed=signed)
        magnitude = abs(objective) + 1e-9
        assert energy(scale * codes, H, b) == pytest.approx(objective, abs=1e-9 * magnitude)
        assert objective <= scan(w, H, b, grid, signed) + 1e-9 * magnitude
        if scale:
            assert any(np.array_equal(codes, q) for q in nearest_codes(w, scale, grid))


@pytest.mark.parametrize("name", ["int2", "q2_0", "fp4", "iq4_nl"])
def test_a_free_scale_is_never_worse_than_a_clamped_one(name: str) -> None:
    gains = []
    for seed in range(30):
        w, H, b = problem(seed, GRIDS[name])
        clamped = sweep(w, H, b, GRIDS[name], signed=True)[2]
        free = sweep(w, H, b, GRIDS[name], signed=True, clamp=False)[2]
        assert free <= clamped + 1e-12 * abs(clamped)
        gains.append(clamped - free)
    assert max(gains) > 0


TINY = ScaleLattice("tiny", 2, -6, 48.0)
"""A lattice with 2-bit significands: small enough to enumerate."""

TINY_POINTS = sorted({m * 2.0**e for e in range(-6, 6) for m in (1, 2, 3) if m * 2.0**e <= 48})


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["int2", "int3", "q2_0", "half levels", "fp4"])
def test_optimal_over_every_point_of_a_coarse_lattice(name: str, signed: bool, clamp: bool) -> None:
    grid = GRIDS[name]
    for seed in range(25):
        w, H, b = problem(seed, grid)
        w, b = w * 4.0 ** (seed % 4), b * 4.0 ** (seed % 4)  # up to beyond the largest scale
        scale, codes, objective = sweep(w, H, b, grid, signed=signed, lattice=TINY, clamp=clamp)
        assert abs(scale) in [0.0, *TINY_POINTS]
        best = min(energies(w, H, b, grid, signed, clamp=clamp))
        assert objective == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert energy(scale * codes, H, b) == pytest.approx(objective, rel=1e-9, abs=1e-12)


def energies(w, H, b, grid, signed: bool, clamp: bool = True) -> list[float]:
    """Objectives at every point of the tiny lattice, with its nearest codes or those of any scale.

    Codes of any scale are found just above and below every transition.
    """
    scales = [*TINY_POINTS, *(-p for p in TINY_POINTS if signed)]
    if clamp:
        return [0.0, *(energy(s * q, H, b) for s in scales for q in nearest_codes(w, s, grid))]
    marks = [m for m in transitions(w, grid) if signed or m > 0]
    codes = [q for m in marks for q in nearest_codes(w, m, grid)]
    signs = [m > 0 for m in marks for _ in range(2)]
    return [
        0.0,
        *(
            energy(s * q, H, b)
            for q, up in zip(codes, signs, strict=True)
            for s in scales
            if (s > 0) == up
        ),
    ]


def test_all_zero_and_all_equal_weights() -> None:
    H = np.eye(3)
    scale, codes, objective = sweep(np.zeros(3), H, np.zeros(3), GRIDS["int2"], signed=True)
    assert (scale, objective) == (0.0, 0.0)
    assert not codes.any()
    same = np.full(3, 0.7)
    scale, codes, _ = sweep(same, H, same, GRIDS["q2_0"], signed=False)
    np.testing.assert_allclose(scale * codes, 0.7)


def test_the_compiled_sweep_and_its_twin_agree_bit_for_bit() -> None:
    rng = np.random.default_rng(5)
    X = correlated(rng, 24, 200)
    H, W = torch.tensor(X.T @ X), torch.tensor(rng.standard_t(4, (40, 24)))
    W[3] = torch.round(W[3] * 2) / 2
    for grid in GRIDS.values():
        levels = torch.tensor(grid)
        for signed in (False, True):
            got = piso_sweep(W, H, W @ H, levels, signed=signed)
            scales, indices, objective = twin.piso_sweep(
                W, H, W @ H, levels, signed, True, 53, -1074, float("inf")
            )
            assert torch.equal(got.level_indices, indices)
            torch.testing.assert_close(got.scales, scales, rtol=1e-12, atol=0)
            torch.testing.assert_close(got.objective, objective, rtol=1e-9, atol=0)


@needs_oracle
@pytest.mark.parametrize("clamp", [True, False])
def test_equals_the_shared_oracle(clamp: bool) -> None:
    oracle = shared_oracle()
    for seed in range(20):
        for grid in GRIDS.values():
            w, H, b = problem(seed, grid)
            for signed in (False, True):
                expected, s, q = oracle.piso(w, H, b, grid, clamp, signed)
                scale, codes, objective = sweep(w, H, b, grid, signed=signed, clamp=clamp)
                assert objective == pytest.approx(expected, rel=1e-10, abs=1e-13)
                reached = energy(scale * codes, H, b)
                assert reached == pytest.approx(energy(s * q, H, b), rel=1e-9, abs=1e-12)


def test_transitions_of_the_oracle_are_where_codes_change() -> None:
    """Guards the oracle itself: between two transitions the codes are constant."""
    grid = GRIDS["int3"]
    w, _, _ = problem(1, grid)
    marks = transitions(w, grid)
    positive = marks[marks > 0]
    for low, high in itertools.pairwise(positive):
        inside = [q for s in np.linspace(low, high, 7)[1:-1] for q in nearest_codes(w, s, grid)]
        assert all(np.array_equal(q, inside[0]) for q in inside)
