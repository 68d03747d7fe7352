"""The sequential solver against explicit minimisation over the columns that are still free."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from pipeline.kernels import round_columns
from pipeline.kernels.twin import columns as twin
from pipeline.quantization.formats import Format, get_format
from pipeline.quantization.objective import LayerObjective
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.rounding import sequential
from pipeline.quantization.scales import absmax, piso
from pipeline.quantization.scales.base import BlockScales
from tests.pipeline.quantization.problems import correlated


def layer(seed: int, rows: int, width: int, tokens: int = 0) -> tuple[torch.Tensor, LayerObjective]:
    rng = np.random.default_rng(seed)
    X = correlated(rng, width, tokens or 4 * width)
    W = torch.tensor(rng.standard_t(4, (rows, width)))
    return W, LayerObjective.from_moments(torch.tensor(X.T @ X), damping=1e-3)


def fixed_rule(scale: float):
    def rule(problem, fmt):
        s = torch.full((len(problem.weights), 1), scale, dtype=torch.float64)
        return BlockScales(s, torch.zeros_like(s), {"d": s.float()})

    return rule


def explicit_gptq(w, H, order, grid, scale):
    """Round columns in order; after each, re-minimise over all columns that are still free."""
    D = len(w)
    v, done = w.copy(), []
    for i in order:
        v[i] = scale * grid[np.argmin(np.abs(grid - v[i] / scale))]
        done.append(i)
        free = [j for j in range(D) if j not in done]
        if free:
            pull = H[np.ix_(free, done)] @ (v[done] - w[done])
            v[free] = w[free] - np.linalg.solve(H[np.ix_(free, free)], pull)
    return v


def solve(W, objective, fmt, rule, order=None, metric="schur"):
    order = order or ColumnOrder.natural(W.shape[1], fmt)
    factor = objective.factor(order.columns)
    return sequential.solve_sequential(
        W, objective.hessian, factor, order, fmt, rule, metric=metric
    )


@pytest.mark.parametrize("lazy", [8, 256])
@pytest.mark.parametrize("ordered", [False, True])
def test_equals_explicit_minimisation_over_free_columns(
    ordered: bool, lazy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "LAZY_COLUMNS", lazy)
    fmt = get_format("INT3_G4")
    W, objective = layer(0, rows=6, width=24)
    order = (
        ColumnOrder.by_activation(objective.hessian.diagonal(), fmt)
        if ordered
        else ColumnOrder.natural(24, fmt)
    )
    got = solve(W, objective, fmt, fixed_rule(0.5), order).dequantize().double()
    H = objective.hessian.numpy()
    for r in range(6):
        expected = explicit_gptq(W[r].numpy(), H, order.columns.tolist(), fmt.grid.numpy(), 0.5)
        np.testing.assert_array_equal(got[r].numpy(), expected)


def test_errors_add_up_to_the_loss() -> None:
    """sum of squared (w - v) / U_ii is the objective (notes on GPTQ as Babai's nearest plane)."""
    W, objective = layer(1, rows=5, width=16)
    factor = objective.factor(torch.arange(16))
    levels = torch.arange(-4.0, 4.0, dtype=torch.float64)
    scales = torch.full((5, 1), 0.4, dtype=torch.float64)
    indices, errors = round_columns(
        W, factor.inverse_root, scales, torch.zeros_like(scales), levels, 16
    )
    loss = objective.loss(0.4 * levels[indices], W)
    torch.testing.assert_close(errors.square().sum(1), loss, rtol=1e-9, atol=1e-12)


def test_the_schur_metric_is_the_minimum_over_later_columns() -> None:
    _, objective = layer(2, rows=1, width=12)
    H = objective.hessian.numpy()
    root = objective.factor(torch.arange(12)).root
    group, later = list(range(4, 8)), list(range(8, 12))
    S = (root[4:8, 4:8] @ root[4:8, 4:8].T).numpy()
    for d in np.random.default_rng(0).standard_normal((20, 4)):
        best = -np.linalg.solve(H[np.ix_(later, later)], H[np.ix_(later, group)] @ d)
        full = np.concatenate([d, best])
        free = H[np.ix_(group + later, group + later)]
        assert d @ S @ d == pytest.approx(full @ free @ full, rel=1e-9)


def test_compiled_rounding_and_its_twin_agree_bit_for_bit() -> None:
    W, objective = layer(3, rows=30, width=64)
    U = objective.factor(torch.arange(64)).inverse_root
    levels = get_format("Q4_1").grid
    scales = torch.rand(30, 2, dtype=torch.float64) * 0.3
    scales[4] = 0
    offsets = -torch.rand(30, 2, dtype=torch.float64)
    got = round_columns(W, U, scales, offsets, levels, 32)
    expected = twin.round_columns(W, U, scales, offsets, levels, 32)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_rounding_with_a_drift_and_its_twin_agree(dtype: torch.dtype) -> None:
    W, objective = layer(6, rows=30, width=64)
    U = objective.factor(torch.arange(64)).inverse_root
    rng = np.random.default_rng(1)
    drift = 0.05 * torch.tensor(rng.standard_normal((64, 64))).triu(1)
    levels = get_format("Q4_1").grid
    scales = torch.tensor(rng.uniform(0, 0.3, (30, 2)))
    scales[4] = 0
    offsets = torch.tensor(rng.uniform(-1, 0, (30, 2)))
    W, U, scales, offsets, levels = (t.to(dtype) for t in (W, U, scales, offsets, levels))
    got = round_columns(W, U, scales, offsets, levels, 32, drift)
    expected = twin.round_columns(W, U, scales, offsets, levels, 32, drift.to(dtype))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    without = round_columns(W, U, scales, offsets, levels, 32)
    none = round_columns(W, U, scales, offsets, levels, 32, torch.zeros_like(drift))
    assert not torch.equal(got[0], without[0])
    assert torch.equal(none[0], without[0])
    assert torch.equal(none[1], without[1])


@pytest.mark.parametrize("name", ["Q2_0", "Q4_0", "INT3_G64", "INT2"])
def test_the_expected_ranking_of_methods(name: str) -> None:
    """Error feedback beats rounding to nearest, PiSO beats absmax, at entry as well as alone."""
    from pipeline.quantization.rounding.nearest import solve_nearest

    fmt: Format = get_format(name)
    W, objective = layer(4, rows=48, width=128, tokens=600)
    H = objective.hessian

    def total(quantized) -> float:
        return float(objective.loss(quantized.dequantize(), W).sum())

    nearest_absmax = total(solve_nearest(W, H, fmt, absmax))
    nearest_piso = total(solve_nearest(W, H, fmt, piso))
    gptq_absmax = total(solve(W, objective, fmt, absmax))
    gptq_piso = total(solve(W, objective, fmt, piso))
    positive = total(solve(W, objective, fmt, partial(piso, signed=False)))
    assert gptq_piso < gptq_absmax < nearest_absmax
    assert gptq_piso < nearest_piso < nearest_absmax
    assert gptq_piso < positive


@pytest.mark.parametrize(
    "name",
    ["Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q6_K", "INT4_G16", "INT2", "Q2_K", "Q3_K", "TQ2_0"],
)
@pytest.mark.parametrize("rule", [absmax, piso])
def test_scales_are_on_the_lattice_and_codes_in_range(name: str, rule) -> None:
    fmt = get_format(name)
    W, objective = layer(5, rows=7, width=256)
    W[2] = 0
    W[3] = 1e-7 * W[3]
    order = ColumnOrder.by_activation(objective.hessian.diagonal(), fmt)
    q = solve(W, objective, fmt, rule, order)
    for field in ("d", "m"):
        if field in q.scales:
            assert torch.equal(q.scales[field], q.scales[field].half().float())
            assert torch.isfinite(q.scales[field]).all()
    codes = q.codes.int() - fmt.code_min
    assert int(codes.min()) >= 0
    assert int(codes.max()) < len(fmt.levels)
    assert not q.dequantize()[2].any()


def test_order_keeps_groups_whole_and_puts_heavy_ones_first() -> None:
    fmt = get_format("Q6_K")
    mass = torch.rand(512, generator=torch.Generator().manual_seed(0))
    order = ColumnOrder.by_activation(mass, fmt)
    assert sorted(order.columns.tolist()) == list(range(512))
    assert torch.equal(order.columns.reshape(-1, 16)[:, 0] // 16, order.groups)
    assert (order.columns.reshape(-1, 16) // 16 == order.groups[:, None]).all()
    assert (order.columns.reshape(-1, 256) // 256 == order.super_groups[:, None]).all()
    assert (mass[order.columns].reshape(-1, 16).diff(dim=1) <= 0).all()
    heavy = mass.reshape(2, 256).sum(1)
    assert heavy[order.super_groups[0]] >= heavy[order.super_groups[1]]
