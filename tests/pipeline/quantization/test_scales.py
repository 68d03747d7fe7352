"""Scale rules other than the exact sweep."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from pipeline.errors import UnsupportedError
from pipeline.quantization.formats import get_format, integer_format
from pipeline.quantization.layer import quantize_free
from pipeline.quantization.rounding.nearest import solve_nearest
from pipeline.quantization.scales import (
    SCALE_RULES,
    BlockProblem,
    absmax,
    mse,
    piso,
    proxy_static,
)
from pipeline.quantization.scales.absmax import smallest_covering_scale
from tests.pipeline.quantization.problems import correlated, energy, weights
from tests.pipeline.quantization.test_piso import TINY, energies


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


def block_problem(seed: int, width: int = 5) -> BlockProblem:
    """Rows of every kind with a linear term that is not ``weights @ metric``."""
    rng = np.random.default_rng(seed)
    X = correlated(rng, width, 3 * width)
    W = torch.tensor(np.stack([weights(rng, width, kind) for kind in range(5)]))
    M = torch.tensor(X.T @ X)
    U = torch.linalg.cholesky(torch.linalg.inv(M)).T
    return BlockProblem(W, M, (W + 0.3 * torch.tensor(rng.standard_normal(W.shape))) @ M, U)


def reduced(problem: BlockProblem, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Metric and centre that a rule is said to look at, spelled out."""
    centre = torch.linalg.solve(problem.metric, problem.b.T).T
    if mode == "identity":
        return torch.eye(len(problem.metric), dtype=torch.float64), problem.weights
    if mode == "diagonal":
        return torch.diag(torch.diag(problem.metric)), centre
    if mode == "proxy":
        return torch.diag(1 / torch.diag(problem.inverse_root) ** 2), centre
    return problem.metric, centre


RULES = {
    "dense": piso,
    "diagonal": partial(piso, hessian="diagonal"),
    "identity": partial(piso, hessian="identity"),
    "proxy": proxy_static,
}


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("mode", RULES)
def test_rules_are_optimal_on_a_coarse_lattice(mode: str, signed: bool, clamp: bool) -> None:
    if mode == "proxy" and not clamp:
        pytest.skip("the published rule has no free variant")
    fmt = integer_format(2, 5, TINY)
    grid = fmt.grid.numpy()
    options = {} if mode == "proxy" else {"clamp": clamp}
    for seed in range(12):
        problem = block_problem(seed)
        found = RULES[mode](problem, fmt, signed=signed, **options)
        V = found.scale * fmt.grid[found.level_indices]
        assert torch.equal(found.fields["d"], found.scale.float())
        metric, centre = (t.numpy() for t in reduced(problem, mode))
        for w, c, v in zip(problem.weights.numpy(), centre, V.numpy(), strict=True):
            b = metric @ c
            best = min(energies(w, metric, b, grid, signed, clamp=clamp))
            assert energy(v, metric, b) == pytest.approx(best, rel=1e-9, abs=1e-12)


def test_without_a_factor_the_proxy_is_the_diagonal_rule() -> None:
    fmt = get_format("INT3_G32")
    problem = replace(block_problem(1, 32), inverse_root=None)
    got, expected = proxy_static(problem, fmt), RULES["diagonal"](problem, fmt)
    assert torch.equal(got.scale, expected.scale)
    assert not torch.equal(got.scale, piso(problem, fmt).scale)


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K"])
def test_offsets_and_sub_scales_see_the_same_part_of_the_metric(name: str) -> None:
    fmt = get_format(name)
    problem = block_problem(2, fmt.super_group)
    for mode, rule in RULES.items():
        if mode == "dense" and fmt.sub_scale is not None:
            continue  # the groups see the factor, not the block of the metric
        metric, centre = reduced(problem, mode)
        explicit = BlockProblem(problem.weights, metric, centre @ metric)
        got, expected = rule(problem, fmt), piso(explicit, fmt)
        clear = [0, 3, 4]  # the ties of the others leave signs open
        for field, values in expected.fields.items():
            torch.testing.assert_close(got.fields[field][clear], values[clear])


def test_an_unknown_hessian_mode_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="'diag'"):
        piso(block_problem(0), get_format("INT2_G32"), hessian="diag")


@pytest.mark.parametrize("name", ["Q4_0", "Q2_0", "INT2_G16", "INT3_G32"])
@pytest.mark.parametrize("signed", [False, True])
def test_the_grid_search_finds_the_best_of_its_factors_and_never_beats_the_sweep(
    name: str, signed: bool
) -> None:
    fmt = get_format(name)
    width = fmt.group_size
    rng = np.random.default_rng(6)
    W = np.stack([weights(rng, width, r % 5) for r in range(30)])
    W[4], W[9] = 1e-9 * W[4], 1e3 * W[9]
    tensor, grid = torch.tensor(W), fmt.grid.numpy()
    problem = BlockProblem(tensor, torch.eye(width, dtype=torch.float64), tensor)

    def error(scale: float, w: np.ndarray) -> float:
        return float(sum(min((scale * level - x) ** 2 for level in grid) for x in w))

    got, exact = (
        mse(problem, fmt, signed=signed),
        piso(problem, fmt, signed=signed, hessian="identity"),
    )
    worse = 0
    for r, w in enumerate(W):
        covering = max(w.max() / grid[-1], w.min() / grid[0], 0)
        mirrored = max(-w.min() / grid[-1], -w.max() / grid[0], 0)
        starts = [covering, -mirrored] if signed else [covering]
        tried = [np.float16(s * (100 - i) / 100).item() for s in starts for i in range(100)]
        found = error(got.scale[r].item(), w)
        assert found == pytest.approx(min(error(s, w) for s in tried), rel=1e-9, abs=1e-30)
        best = error(exact.scale[r].item(), w)
        assert best <= found * (1 + 1e-9) + 1e-30
        worse += found > best * (1 + 1e-9)
    assert worse > 10
    assert bool((got.scale < 0).any()) == signed


@pytest.mark.parametrize("name", ["Q4_1", "Q6_K"])
def test_the_grid_search_beats_covering_scales_with_offsets_and_sub_scales(name: str) -> None:
    fmt = get_format(name)
    W, _ = block(8, 20, 256)
    W[0] = 0
    W[1] = 0.5
    found, covering = (
        (solve_nearest(W, None, fmt, rule).dequantize() - W).square().sum(1)
        for rule in (mse, absmax)
    )
    assert found.sum() < covering.sum()
    assert found[0] == 0


def test_rules_by_name() -> None:
    named = {"absmax": absmax, "mse": mse, "piso": piso, "proxy": proxy_static}
    assert named.items() <= SCALE_RULES.items()
