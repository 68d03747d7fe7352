"""Look-ahead scales: the loss kernel, and that the rule never loses to PiSO in it."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from pipeline.kernels import round_columns, sequential_loss
from pipeline.kernels.twin import lookahead as twin
from pipeline.quantization.formats import FP16, FP32, Format, ScaleLattice, get_format
from pipeline.quantization.objective import LayerObjective
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.rounding.sequential import solve_sequential
from pipeline.quantization.scales.base import BlockProblem
from pipeline.quantization.scales.lookahead import lookahead
from pipeline.quantization.scales.piso import piso
from tests.pipeline.quantization.problems import GRIDS, correlated

lookahead_module = importlib.import_module("pipeline.quantization.scales.lookahead")
COARSE = ScaleLattice("coarse", 4, -6, 60.0)
POWERS = ScaleLattice("powers of two", 1, -10, 64.0)


def entry(
    seed: int, rows: int, group: int, later: int = 16
) -> tuple[BlockProblem, LayerObjective, torch.Tensor]:
    """A group that the sequential solver enters with `later` columns still free behind it."""
    rng = np.random.default_rng(seed)
    width = group + later
    X = correlated(rng, width, 4 * width)
    objective = LayerObjective.from_moments(torch.tensor(X.T @ X), damping=1e-2)
    factor = objective.factor(torch.arange(width))
    part = slice(0, group)
    S = factor.root[part, part] @ factor.root[part, part].T
    x = torch.tensor(rng.standard_t(4, (rows, group)))
    x[0] = 0
    x[1] = torch.round(x[1] * 2) / 2
    x[2] = 0.3
    problem = BlockProblem(x, S, x @ S, factor.inverse_root[part, part])
    return problem, objective, factor.inverse_root


def grid_format(levels: np.ndarray, group: int, lattice: ScaleLattice) -> Format:
    return Format("GRID", tuple(levels.tolist()), group, group, False, True, lattice, 0.0)


def loss(problem: BlockProblem, fmt: Format, scale: torch.Tensor, offset=None) -> torch.Tensor:
    assert problem.inverse_root is not None
    return sequential_loss(problem.weights, problem.inverse_root, scale, fmt.grid, offset)


def explicit(x: np.ndarray, H: np.ndarray, grid: np.ndarray, s: float, m: float) -> float:
    """Round the first len(x) columns of H in order, re-minimising over all others after each."""
    group, width = len(x), len(H)
    target = np.concatenate([x, np.zeros(width - group)])
    v = target.copy()
    for i in range(group):
        distance = np.abs(s * grid + m - v[i])
        v[i] = s * grid[distance.argmin()] + m
        free = np.arange(i + 1, width)
        fixed = np.arange(i + 1)
        pull = H[np.ix_(free, fixed)] @ (v[fixed] - target[fixed])
        v[free] = target[free] - np.linalg.solve(H[np.ix_(free, free)], pull)
    return float((v - target) @ H @ (v - target))


@pytest.mark.parametrize("name", ["int2", "int4", "half levels", "fp4"])
def test_the_kernel_equals_explicit_minimisation_over_free_columns(name: str) -> None:
    problem, objective, _ = entry(0, 8, 6)
    rng = np.random.default_rng(1)
    scales = torch.tensor(rng.uniform(0.1, 1.0, (8, 3)) * rng.choice([-1, 1], (8, 3)))
    scales[3, 0] = 0
    offsets = torch.tensor(rng.uniform(-0.2, 0.2, (8, 3)))
    U = problem.inverse_root
    got = sequential_loss(problem.weights, U, scales, torch.tensor(GRIDS[name]), offsets)
    plain = sequential_loss(problem.weights, U, scales, torch.tensor(GRIDS[name]))
    H = objective.hessian.numpy()
    for r in (3, 4, 5, 6, 7):
        for n in range(3):
            x, s, m = problem.weights[r].numpy(), float(scales[r, n]), float(offsets[r, n])
            assert float(got[r, n]) == pytest.approx(explicit(x, H, GRIDS[name], s, m), rel=1e-9)
            assert float(plain[r, n]) == pytest.approx(explicit(x, H, GRIDS[name], s, 0), rel=1e-9)


@pytest.mark.parametrize("levels", [2, 3, 16, 31, 33, 64, 256])
def test_the_compiled_loss_and_its_twin_agree(levels: int) -> None:
    problem, _, _ = entry(2, 40, 16)
    grid = torch.arange(levels, dtype=torch.float64) - levels // 2
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    scales[:, 1] = 1
    problem.weights[:, 0] = torch.arange(40) / 2  # halfway between levels at scale 1
    scales[5] = 0
    offsets = torch.randn(40, 5, generator=generator, dtype=torch.float64) / 4
    offsets[:, 1] = 0
    U = problem.inverse_root
    assert U is not None
    got = sequential_loss(problem.weights, U, scales, grid, offsets)
    expected = twin.sequential_loss(problem.weights, U, scales, offsets, grid)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("lattice", [FP16, COARSE, POWERS], ids=lambda lattice: lattice.name)
@pytest.mark.parametrize("name", ["int2", "int4", "ternary", "half levels", "fp4", "iq4_nl"])
def test_never_worse_than_piso_and_on_the_lattice(
    name: str, lattice: ScaleLattice, signed: bool
) -> None:
    fmt = grid_format(GRIDS[name], 16, lattice)
    problem, _, _ = entry(3, 60, 16)
    found, start = lookahead(problem, fmt, signed=signed), piso(problem, fmt, signed=signed)
    assert found.level_indices is None
    assert torch.equal(lattice.round(found.scale), found.scale)
    assert torch.equal(found.fields["d"].double(), found.scale)
    assert signed or (found.scale >= 0).all()
    assert not found.offset.any()
    reached, before = loss(problem, fmt, found.scale), loss(problem, fmt, start.scale)
    assert (reached <= before * (1 + 1e-12)).all()
    assert reached[3:].sum() < before[3:].sum()


@pytest.mark.parametrize(("name", "gap"), [("int2", 1.02), ("int3", 1.03), ("int4", 1.04)])
def test_close_to_the_best_of_every_lattice_scale(name: str, gap: float) -> None:
    """Bounds the gap to brute force over all fp16-like scales in a wide range; it is not 0."""
    fmt = grid_format(GRIDS[name], 8, ScaleLattice("7 bits", 7, -9, 60.0))
    problem, _, _ = entry(4, 80, 8)
    octaves = [2.0**e * (1 + k / 64) for e in range(-5, 3) for k in range(64)]
    every = torch.tensor([*octaves, *(-s for s in octaves)], dtype=torch.float64).expand(80, -1)
    best = loss(problem, fmt, every).amin(1)[3:]
    found = loss(problem, fmt, lookahead(problem, fmt).scale)[3:, 0]
    start = loss(problem, fmt, piso(problem, fmt).scale)[3:, 0]
    assert (found >= best * (1 - 1e-9)).all()
    assert found.sum() < gap * best.sum()
    assert start.sum() > 1.05 * best.sum()


def test_more_candidates_and_the_polish_help(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = get_format("INT3_G16")
    problem, _, _ = entry(5, 200, 16)

    def total(rule, **options) -> float:
        return float(loss(problem, fmt, rule(problem, fmt, **options).scale).sum())

    start, few, many = total(piso), total(lookahead, candidates=4), total(lookahead, candidates=64)
    assert many < few < start
    monkeypatch.setattr(lookahead_module, "POLISHES", 0)
    assert few < total(lookahead, candidates=4)


@pytest.mark.parametrize("affine", [False, True])
def test_the_polish_is_the_least_squares_fit_of_the_codes(affine: bool) -> None:
    problem, _, _ = entry(9, 12, 16)
    U = problem.inverse_root
    assert U is not None
    levels = torch.arange(-4.0, 4.0, dtype=torch.float64)
    scale = torch.full((12, 1), 0.4, dtype=torch.float64)
    offset = torch.full_like(scale, 0.1 * affine)
    fmt = Format("x", tuple(levels.tolist()), 16, 16, affine, True, FP32, 4.0)
    search = lookahead_module._Search(problem.weights, U, levels, fmt)
    scales, offsets = search.refitted((scale, offset))
    indices, _ = round_columns(problem.weights, U, scale, offset, levels, 16)
    S = problem.metric.numpy()
    for r in range(3, 12):
        q, x = levels[indices[r]].numpy(), problem.weights[r].numpy()
        basis = np.stack([q, np.ones(16)] if affine else [q], axis=1)
        fit = np.linalg.solve(basis.T @ S @ basis, basis.T @ S @ x)
        np.testing.assert_allclose(scales[r].numpy(), fit[0], rtol=1e-6)
        expected = (x @ S.sum(1) - scales[r].numpy() * (q @ S.sum(1))) / S.sum() * affine
        np.testing.assert_allclose(offsets[r].numpy(), expected, rtol=1e-6)


def test_offsets_are_searched_with_their_scales() -> None:
    fmt = get_format("Q4_1")
    problem, _, _ = entry(6, 40, 32)
    found, start = lookahead(problem, fmt), piso(problem, fmt)
    for field in (found.scale, found.offset):
        assert torch.equal(FP16.round(field), field)
    assert torch.equal(found.fields["m"].double(), found.offset)
    reached = loss(problem, fmt, found.scale, found.offset)
    before = loss(problem, fmt, start.scale, start.offset)
    assert (reached <= before * (1 + 1e-12)).all()
    assert reached[3:].sum() < 0.97 * before[3:].sum()


@pytest.mark.parametrize("name", ["INT2_G32", "INT3_G32", "Q4_0", "Q4_1"])
def test_the_whole_layer_gains(name: str) -> None:
    fmt = get_format(name)
    rng = np.random.default_rng(7)
    X = correlated(rng, 128, 512)
    objective = LayerObjective.from_moments(torch.tensor(X.T @ X))
    W = torch.tensor(rng.standard_t(4, (48, 128)))
    order = ColumnOrder.by_activation(objective.hessian.diagonal(), fmt)
    factor = objective.factor(order.columns)
    total = {}
    for rule in (piso, lookahead):
        solved = solve_sequential(W, objective.hessian, factor, order, fmt, rule)
        total[rule.__name__] = float(objective.loss(solved.dequantize(), W).sum())
    assert total["lookahead"] < 0.95 * total["piso"]


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_without_a_recursion_or_with_sub_scales_it_is_piso(name: str) -> None:
    fmt = get_format(name)
    problem, _, _ = entry(8, 6, fmt.super_group)
    if name == "Q4_0":
        problem = BlockProblem(problem.weights, problem.metric, problem.linear)
    found, start = lookahead(problem, fmt), piso(problem, fmt)
    assert torch.equal(found.scale, start.scale)
    assert (found.level_indices is None) == (start.level_indices is None)
