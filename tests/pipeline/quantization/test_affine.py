"""Affine grids: the arrangement search, offsets on a lattice, and integer zero points."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.kernels import affine_lines, affine_offsets
from pipeline.kernels.twin import affine as twin
from pipeline.quantization.formats import FP16, FP32, Format, ScaleLattice, get_format
from pipeline.quantization.scales import affine
from pipeline.quantization.scales.affine import fit_offsets, piso_affine, piso_zero_point
from pipeline.quantization.scales.base import BlockProblem, BlockScales
from tests.pipeline.quantization.problems import correlated, energy, nearest_codes, scan, weights
from tests.pipeline.quantization.test_piso import SHARED_ORACLE, needs_oracle

COARSE = ScaleLattice("coarse", 3, -4, 12.0)
"""Small enough to enumerate: 3-bit significands, steps of 1/16 and more."""
POINTS = np.array(
    sorted({c for m in range(8) for e in range(-4, 2) if (c := m * 2.0**e) <= 12} | {0.0})
)


def rows(seed: int, count: int, width: int, kind: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    X = correlated(rng, width, 6 * width)
    W = np.stack([weights(rng, width, kind) for _ in range(count)])
    return torch.tensor(W), torch.tensor(X.T @ X)


def form(group: int, levels: int, lattice: ScaleLattice = FP16) -> Format:
    grid = tuple(float(k) for k in range(levels))
    return Format("AFFINE", grid, group, group, True, True, lattice, 0.0)


def objective(found: BlockScales, M: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert found.level_indices is not None
    v = found.scale * found.level_indices + found.offset
    return ((v @ M) * v).sum(1) - 2 * (v * b).sum(1)


def all_lines(W: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return affine._all_thresholds(W, levels - 1)


def reachable(w: np.ndarray, levels: int) -> set[tuple[float, ...]]:
    """Codes just around every crossing of two thresholds ``u w_i + z = k + 1/2`` with u >= 0."""
    thresholds = [(x, k + 0.5) for x in w for k in range(levels - 1)]
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False) + 0.01
    found = set()
    for (x, k), (y, n) in itertools.combinations(thresholds, 2):
        u = (k - n) / (x - y) if x != y else -1.0
        if u < 0:
            continue
        for du, dz in zip(1e-6 * np.cos(angles), 1e-6 * np.sin(angles), strict=True):
            if u + du > 0:
                place = (u + du) * w + k - u * x + dz
                found.add(tuple(np.clip(np.floor(place + 0.5), 0, levels - 1)))
    return found


def least_squares(q: np.ndarray, M: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Objective, scale and offset of the best fit; the scale is not positive if none helps."""
    basis = np.stack([q, np.ones_like(q)], axis=1)
    s, m = np.linalg.lstsq(basis.T @ M @ basis, basis.T @ b, rcond=None)[0]
    return energy(s * q + m, M, b), s, m


@pytest.mark.parametrize(("width", "levels"), [(3, 2), (5, 3), (4, 4), (3, 6)])
@pytest.mark.parametrize("kind", [0, 1])
def test_the_search_finds_the_best_of_all_reachable_codes(
    width: int, levels: int, kind: int
) -> None:
    """Kind 1 has equal weights and crossings of many thresholds in one point."""
    for seed in range(6):
        W, M = rows(seed, 1, width, kind)
        b = W @ M + (0 if seed % 2 else 0.3 * M.diagonal())
        if len(W.unique()) < 2:
            continue
        gain, codes = affine_lines(W, M, b, levels, *all_lines(W, levels))
        m, bb, q = M.numpy(), b[0].numpy(), codes[0].numpy()
        flat = -(float(b.sum()) ** 2) / float(M.sum())
        fits = [least_squares(np.array(c), m, bb) for c in reachable(W[0].numpy(), levels)]
        best = min((e for e, s, _ in fits if s > 1e-9), default=flat)
        reached, scale, _ = least_squares(q.astype(float), m, bb)
        assert flat - float(gain) == pytest.approx(reached, rel=1e-9)
        assert reached <= best + 1e-9 * abs(best)
        assert scale > 0
        if kind == 0:
            assert reached == pytest.approx(best, rel=1e-9)
            assert tuple(q.astype(float)) in reachable(W[0].numpy(), levels)


@needs_oracle
def test_equals_the_shared_oracle() -> None:
    spec = importlib.util.spec_from_file_location("piso_oracle", SHARED_ORACLE)
    assert spec is not None
    assert spec.loader is not None
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    for seed in range(6):
        W, M = rows(seed, 1, 6)
        b = W @ M
        expected = oracle.piso_affine_exact(W[0].numpy(), M.numpy(), b[0].numpy(), 2)[0][0]
        found = objective(piso_affine(BlockProblem(W, M, b), form(6, 4, FP32)), M, b)
        assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("levels", [2, 4, 16])
def test_compiled_walks_and_their_twins_agree(levels: int) -> None:
    W, M = rows(3, 25, 8)
    W[4] = torch.round(W[4] * 2) / 2
    W[5] = 0.25
    W[6] = 0
    b = W @ M + 0.1 * M.diagonal()
    lines, anchors = all_lines(W, levels)
    free = torch.randn(25, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lines = torch.cat([lines, free], dim=1)
    anchors = torch.cat([anchors, torch.full((25, 5), -1)], dim=1)
    reduced = M - torch.outer(M.sum(1), M.sum(1)) / M.sum()
    share = b - b.sum(1, keepdim=True) * M.sum(1) / M.sum()
    gains, codes = affine_lines(W, M, b, levels, lines, anchors)
    least = 1e-11 * float(M.diagonal().sum())
    expected = twin.affine_lines(W, reduced, share, levels - 1.0, lines, anchors, least)
    torch.testing.assert_close(gains, expected[0], rtol=1e-9, atol=1e-9)
    # Codes one higher, with another offset, are as good: compare what they reach.
    for q in (codes, expected[1].long()):
        s, m = fit_offsets(q, M, b)
        v = s[:, None] * q + m[:, None]
        reached = ((v @ M) * v).sum(1) - 2 * (v * b).sum(1)
        flat = -b.sum(1).square() / M.sum()
        torch.testing.assert_close(flat - gains, reached, rtol=1e-9, atol=1e-9)
    scales = torch.tensor([0.3, 0.0, -0.7, 1.5], dtype=torch.float64).repeat(25, 1)
    got = affine_offsets(W, M, b, levels, scales, FP16)
    limits = (11, -24, -FP16.max_value, FP16.max_value)
    other = twin.affine_offsets(W, M, b, levels - 1.0, scales, *limits)
    for s, m, q, value in (got, other):
        v = s[:, None] * q + m[:, None]
        reached = ((v @ M) * v).sum(1) - 2 * (v * b).sum(1)
        torch.testing.assert_close(value, reached, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[3], other[3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lattice", [COARSE, ScaleLattice("positive", 3, -4, 12.0, signed=False)])
def test_offsets_are_optimal_over_every_lattice_point(lattice: ScaleLattice) -> None:
    offsets = np.unique(np.concatenate([POINTS, -POINTS])) if lattice.signed else POINTS
    for seed in range(12):
        W, M = rows(seed, 1, 4, seed % 5)
        b = W @ M
        w, m, bb = W[0].numpy(), M.numpy(), b[0].numpy()
        scales = [0.5, -0.75, 0.0] if lattice.signed else [0.5, 1.25]
        best = np.inf
        for s in scales:
            turns = [0.0] if s == 0 else [k + 0.5 - x / s for x in w for k in range(3)]
            for z in [t + d for t in turns for d in (-1e-9, 1e-9)]:
                q = np.clip(np.floor((w / s if s else 0 * w) + z + 0.5), 0, 3)
                best = min([best, *(energy(s * q + c, m, bb) for c in offsets)])
        found = affine_offsets(W, M, b, 4, torch.tensor([scales]), lattice)
        assert float(found[3]) == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert float(found[1]) in offsets
        v = found[0][:, None] * found[2] + found[1][:, None]
        assert energy(v[0].numpy(), m, bb) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("signed", [False, True])
def test_scale_and_offset_stay_the_best_pair_on_the_lattice(signed: bool) -> None:
    signs = (1, -1) if signed else (1,)
    points = np.unique(np.concatenate([POINTS, -POINTS]))
    for seed in range(15):
        W, M = rows(seed, 1, 6, seed % 4)
        b = W @ M
        found = piso_affine(BlockProblem(W, M, b), form(6, 4, COARSE), signed=signed)
        assert found.level_indices is not None
        s, m = float(found.scale), float(found.offset)
        assert abs(s) in POINTS
        assert signed or s >= 0
        assert m in points
        q = found.level_indices[0].double().numpy()
        reached = energy(s * q + m, M.numpy(), b[0].numpy())
        codes = affine._codes(W, M, b, 3)[1]
        for c, sign in itertools.product((codes[0].double().numpy(), q), signs):
            mirrored = c if sign > 0 else 3 - c
            fitted = fit_offsets(torch.tensor(mirrored)[None], M, b)[0]
            for near in COARSE.neighbours(fitted):
                for offset in points:
                    v = max(float(near), -12.0 * signed) * mirrored + offset
                    assert reached <= energy(v, M.numpy(), b[0].numpy()) + 1e-9 * abs(reached)


@pytest.mark.parametrize(("width", "levels", "gap"), [(16, 4, 1.01), (16, 8, 1.02), (24, 8, 1.03)])
def test_the_search_for_large_blocks_is_close_to_exact(
    width: int, levels: int, gap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, M = rows(8, 60, width)
    b = W @ M
    constant = (W * b).sum(1)
    fmt, problem = form(width, levels, FP32), BlockProblem(W, M, b)
    monkeypatch.setattr(affine, "EXACT_CROSSINGS", 10**9)
    exact = constant + objective(piso_affine(problem, fmt), M, b)
    monkeypatch.setattr(affine, "EXACT_CROSSINGS", 0)
    found = constant + objective(piso_affine(problem, fmt), M, b)
    assert (found >= exact * (1 - 1e-9)).all()
    assert (found / exact).mean() < gap


def test_a_linear_term_of_its_own_moves_what_is_rounded() -> None:
    """With b of another target t, rounding t is searched as well as rounding the weights."""
    W, M = rows(9, 30, 8)
    target = W + 0.7 * rows(10, 30, 8)[0]
    b, fmt = target @ M, form(8, 4, FP32)
    found = objective(piso_affine(BlockProblem(W, M, b), fmt), M, b)
    for start in (W, target):
        gain, _ = affine_lines(start, M, b, 4, *all_lines(start, 4))
        bound = -gain - b.sum(1).square() / M.sum()
        assert (found <= bound + 1e-6 * bound.abs()).all()


@pytest.mark.parametrize("name", ["Q4_1"])
def test_constant_rows_and_extremes(name: str) -> None:
    fmt = get_format(name)
    W, M = rows(11, 6, 32)
    W[0], W[1] = 0, 0.25
    W[2] *= 1e-7
    W[3] *= 1e4
    W[4, 3] = 60000.0
    found = piso_affine(BlockProblem(W, M, W @ M), fmt)
    assert found.level_indices is not None
    v = found.scale * found.level_indices + found.offset
    assert torch.isfinite(v).all()
    assert not v[0].any()
    assert (v[1] == 0.25).all()
    for field in ("d", "m"):
        assert torch.equal(found.fields[field], found.fields[field].half().float())
    assert int(found.level_indices.min()) >= 0
    assert int(found.level_indices.max()) <= 15
    relative = ((v - W)[3:] @ M * (v - W)[3:]).sum(1) / (W[3:] @ M * W[3:]).sum(1)
    assert relative.max() < 0.02


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_zero_points_are_optimal_over_every_zero_point_and_scale(bits: int) -> None:
    codes = np.arange(2.0**bits)
    used = set()
    for seed in range(20):
        W, M = rows(seed, 1, 5, seed % 5)
        b = W @ M + (0.2 * M.diagonal() if seed % 2 else 0)
        w, m, bb = W[0].numpy(), M.numpy(), b[0].numpy()
        found = piso_zero_point(BlockProblem(W, M, b), bits, lattice=FP32)
        best = min(scan(w, m, bb, codes - z, signed=True) for z in codes)
        z, s, q = int(found.zero_points), float(found.scales), found.codes[0].double().numpy()
        reached = float(found.objective)
        used.add(z)
        assert energy(s * (q - z), m, bb) == pytest.approx(reached, rel=1e-9, abs=1e-12)
        assert reached <= best + 1e-6 * abs(best)
        assert 0 <= z < 2**bits
        assert q.min() >= 0
        assert q.max() < 2**bits
    assert len(used) > 1


def test_zero_points_on_an_enumerated_lattice() -> None:
    for seed in range(15):
        W, M = rows(seed, 1, 5, seed % 4)
        b = W @ M
        w, m, bb = W[0].numpy(), M.numpy(), b[0].numpy()
        best = 0.0
        for z, s in itertools.product(range(4), [*POINTS[1:], *-POINTS[1:]]):
            grid = np.arange(4.0) - z
            best = min([best, *(energy(s * q, m, bb) for q in nearest_codes(w, s, grid))])
        found = piso_zero_point(BlockProblem(W, M, b), 2, lattice=COARSE)
        assert float(found.objective) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bits", [0, 9])
def test_zero_points_of_impossible_width_are_refused(bits: int) -> None:
    W, M = rows(0, 1, 4)
    with pytest.raises(InputError, match="zero points"):
        piso_zero_point(BlockProblem(W, M, W @ M), bits, lattice=FP32)
