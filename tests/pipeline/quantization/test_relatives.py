"""GPTAQ, Qronos and GPFQ against slow transcriptions of their published steps in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.quantization.formats import get_format
from pipeline.quantization.objective import LayerObjective
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.rounding import sequential
from pipeline.quantization.rounding.gpfq import solve_gpfq
from pipeline.quantization.rounding.gptaq import gptaq_drift
from pipeline.quantization.rounding.qronos import qronos_target, solve_qronos
from pipeline.quantization.rounding.sequential import solve_sequential
from pipeline.quantization.scales import absmax
from pipeline.quantization.scales.base import BlockProblem, BlockScales
from tests.pipeline.quantization.problems import correlated


class Layer:
    """A random layer; damping is made part of the tokens, so these alone define everything."""

    def __init__(self, seed: int, rows: int, width: int, name: str, *, ordered: bool = False):
        rng = np.random.default_rng(seed)
        X = correlated(rng, width, 4 * width)
        Xq = X @ (np.eye(width) + 0.1 * rng.standard_normal((width, width)) / width**0.5)
        Xq = Xq + 0.1 * np.abs(X).mean() * rng.standard_normal(X.shape)
        moments = torch.tensor(Xq.T @ Xq), torch.tensor(Xq.T @ X)
        self.objective = LayerObjective.from_moments(*moments, damping=1e-3)
        ridge = self.objective.damping**0.5 * np.eye(width)
        self.X, self.Xq = np.concatenate([X, ridge]), np.concatenate([Xq, ridge])
        self.W = torch.tensor(rng.standard_t(4, (rows, width)))
        self.fmt = get_format(name)
        self.H, self.G = self.objective.hessian, self.objective.cross
        self.order = (
            ColumnOrder.by_activation(self.H.diagonal(), self.fmt)
            if ordered
            else ColumnOrder.natural(width, self.fmt)
        )
        self.columns = self.order.columns.numpy()
        self.factor = self.objective.factor(self.order.columns)

    def in_order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """X, Xq and W with their columns in solver order."""
        return self.X[:, self.columns], self.Xq[:, self.columns], self.W.numpy()[:, self.columns]

    def gptq(self, target: torch.Tensor, rule, drift: torch.Tensor | None = None):
        return solve_sequential(
            target, self.H, self.factor, self.order, self.fmt, rule, drift=drift
        )


class DrawnScales:
    """A rule that draws scales and offsets, and remembers what it saw and drew."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.problems: list[BlockProblem] = []
        self.scale: list[np.ndarray] = []
        self.offset: list[np.ndarray] = []

    def __call__(self, problem: BlockProblem, fmt) -> BlockScales:
        self.problems.append(problem)
        rows, width = problem.weights.shape
        group = fmt.group_of(width)
        shape = (rows, width // group)
        top = max(abs(level) for level in fmt.levels)
        scale = torch.tensor(self.rng.uniform(1.5, 2.5, shape) / top).float()
        offset = torch.tensor(self.rng.uniform(-1, 0, shape) * fmt.affine).float()
        self.scale.append(scale.double().numpy().repeat(group, axis=1))
        self.offset.append(offset.double().numpy().repeat(group, axis=1))
        stored = {"d": scale[:, :1] if fmt.sub_scale else scale}
        if fmt.affine:
            stored["m"] = offset
        return BlockScales(scale, offset, stored)

    def nearest(self, fmt):
        """Codes and values of a column at a position, for one row."""
        scale, offset = np.concatenate(self.scale, 1), np.concatenate(self.offset, 1)
        grid = fmt.grid.numpy()

        def round_one(row: int, position: int, value: float) -> tuple[int, float]:
            s, m = scale[row, position], offset[row, position]
            index = int(np.argmin(np.abs(grid - (value - m) / s)))
            return index + fmt.code_min, s * grid[index] + m

        return round_one


def stored_order(codes: np.ndarray, columns: np.ndarray) -> np.ndarray:
    out = np.empty_like(codes)
    out[:, columns] = codes
    return out


CASES = [
    ("INT3_G4", 24, False, 8),
    ("INT3_G4", 24, True, 12),
    ("INT3_G4", 24, True, 256),
    ("INT2", 20, False, 256),
    ("Q4_1", 96, True, 64),
    ("Q6_K", 512, False, 256),
]


def explicit_gptaq(layer: Layer, rule: DrawnScales, alpha: float) -> np.ndarray:
    """Column by column; the rows of P from explicit inverses over the columns still to come."""
    X, Xq, W = layer.in_order()
    H, D = Xq.T @ Xq, (X - Xq).T @ Xq
    width = W.shape[1]
    round_one = rule.nearest(layer.fmt)
    codes = np.zeros(W.shape, dtype=np.int8)
    for i in range(width):
        later = slice(i + 1, width)
        inverse = np.linalg.inv(H[later, later])
        for r in range(len(W)):
            x = W[r, i]
            codes[r, i], v = round_one(r, i, x)
            # The error moves later columns to their conditional minimum, the drift to alpha of the
            # least-squares answer to this column's mismatch.
            W[r, later] += (x - v) * H[i, later] @ inverse + alpha * x * D[i, later] @ inverse
    return stored_order(codes, layer.columns)


@pytest.mark.parametrize(("name", "width", "ordered", "lazy"), CASES[:-1])
def test_gptaq_takes_the_published_steps(
    name: str, width: int, ordered: bool, lazy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "LAZY_COLUMNS", lazy)
    layer, rule = Layer(0, 5, width, name, ordered=ordered), DrawnScales()
    drift = gptaq_drift(layer.H, layer.G, layer.factor, alpha=0.7)
    got = layer.gptq(layer.W, rule, drift)
    plain = layer.gptq(layer.W, DrawnScales())
    np.testing.assert_array_equal(got.codes.numpy(), explicit_gptaq(layer, rule, 0.7))
    assert not torch.equal(got.codes, plain.codes)


@pytest.mark.parametrize(("name", "width", "ordered", "lazy"), CASES)
def test_any_drift_reaches_all_later_columns(
    name: str, width: int, ordered: bool, lazy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "LAZY_COLUMNS", lazy)
    layer, rule = Layer(1, 3, width, name, ordered=ordered), DrawnScales()
    P = np.triu(0.3 * np.random.default_rng(5).standard_normal((width, width)) / width**0.5, 1)
    got = layer.gptq(layer.W, rule, torch.tensor(P))
    _, Xq, W = layer.in_order()
    U = np.linalg.cholesky(np.linalg.inv(Xq.T @ Xq)).T
    round_one = rule.nearest(layer.fmt)
    codes = np.zeros(W.shape, dtype=np.int8)
    for r, w in enumerate(W):
        for i in range(width):
            x = w[i]
            codes[r, i], v = round_one(r, i, x)
            w[i + 1 :] += x * P[i, i + 1 :] - (x - v) / U[i, i] * U[i, i + 1 :]
    np.testing.assert_array_equal(got.codes.numpy(), stored_order(codes, layer.columns))


def test_drift_is_strictly_upper_and_vanishes_with_alpha_or_mismatch() -> None:
    layer = Layer(2, 4, 32, "INT3_G16", ordered=True)
    drift = gptaq_drift(layer.H, layer.G, layer.factor)
    assert drift.abs().max() > 0
    assert torch.equal(drift, drift.triu(1))
    assert not gptaq_drift(layer.H, layer.H, layer.factor).any()
    none = gptaq_drift(layer.H, layer.G, layer.factor, alpha=0.0)
    got, plain = (layer.gptq(layer.W, absmax, drift) for drift in (none, None))
    assert torch.equal(got.codes, plain.codes)
    assert torch.equal(got.scales["d"], plain.scales["d"])


def output_error(layer: Layer, quantized) -> float:
    V = quantized.dequantize().double().numpy()
    return float(((layer.X @ layer.W.numpy().T - layer.Xq @ V.T) ** 2).sum())


def test_methods_that_see_the_mismatch_beat_gptq_on_it() -> None:
    layer = Layer(3, 64, 64, "INT4_G16", ordered=True)
    H, G, factor, order, fmt = layer.H, layer.G, layer.factor, layer.order, layer.fmt
    gptq = output_error(layer, layer.gptq(layer.W, absmax))
    drift = gptaq_drift(H, G, factor, alpha=1.0)
    gptaq = output_error(layer, layer.gptq(layer.W, absmax, drift))
    qronos = output_error(layer, solve_qronos(layer.W, H, G, factor, order, fmt, absmax))
    gpfq = output_error(layer, solve_gpfq(layer.W, H, G, order, fmt, absmax))
    blind = output_error(layer, solve_gpfq(layer.W, H, None, order, fmt, absmax))
    assert qronos < gptaq < gptq
    assert gpfq < blind


def explicit_qronos(layer: Layer, rule: DrawnScales) -> np.ndarray:
    """First column alone, re-solve of all others, then GPTQ on what is left of H."""
    X, Xq, W = layer.in_order()
    H, G = Xq.T @ Xq, Xq.T @ X
    round_one = rule.nearest(layer.fmt)
    codes = np.zeros(W.shape, dtype=np.int8)
    inverse = np.linalg.inv(H)
    A = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    L = np.linalg.cholesky(A).T
    for r, w in enumerate(W):
        first = (G[0] @ w - H[0, 1:] @ w[1:]) / H[0, 0]
        codes[r, 0], q = round_one(r, 0, first)
        rest = (w @ G.T[:, 1:] - q * H[0, 1:]) @ A
        for i in range(len(rest)):
            codes[r, i + 1], v = round_one(r, i + 1, rest[i])
            rest[i:] -= (rest[i] - v) / L[i, i] * L[i, i:]
    return stored_order(codes, layer.columns)


def test_qronos_takes_the_published_steps_and_equals_the_solver_after_the_first_code() -> None:
    same = 0
    for seed in range(12):
        layer, rule = Layer(seed, 6, 24, "INT3_G4", ordered=seed % 2 == 0), DrawnScales()
        solved = solve_qronos(layer.W, layer.H, layer.G, layer.factor, layer.order, layer.fmt, rule)
        got = solved.codes.numpy()
        np.testing.assert_array_equal(got, explicit_qronos(layer, rule))
        target = layer.objective.target(layer.W, 1.0)
        plain = layer.gptq(target, DrawnScales()).codes.numpy()
        agree = got[:, layer.columns[0]] == plain[:, layer.columns[0]]
        np.testing.assert_array_equal(got[agree], plain[agree])
        same += int(agree.sum())
    assert 0 < same < 72


def test_qronos_of_equal_streams_is_gptq() -> None:
    layer = Layer(0, 6, 24, "INT3_G4", ordered=True)
    target = qronos_target(layer.W, layer.H, layer.H, layer.factor)
    torch.testing.assert_close(target, layer.W, rtol=1e-9, atol=1e-9)


def explicit_gpfq(layer: Layer, rule: DrawnScales, reference: np.ndarray) -> np.ndarray:
    """The error of all tokens is kept as a vector; each column takes its own projection of it."""
    X, Xq, W = reference[:, layer.columns], *layer.in_order()[1:]
    round_one = rule.nearest(layer.fmt)
    codes = np.zeros(W.shape, dtype=np.int8)
    for r, w in enumerate(W):
        u = np.zeros(len(X))
        for t in range(len(w)):
            wanted = u + X[:, t] * w[t]
            codes[r, t], v = round_one(r, t, Xq[:, t] @ wanted / (Xq[:, t] @ Xq[:, t]))
            u = wanted - Xq[:, t] * v
    return stored_order(codes, layer.columns)


@pytest.mark.parametrize(("name", "width", "ordered", "lazy"), CASES[1:])
def test_gpfq_follows_the_residual_of_the_tokens(
    name: str, width: int, ordered: bool, lazy: int
) -> None:
    layer, rule, blind = Layer(4, 5, width, name, ordered=ordered), DrawnScales(), DrawnScales()
    got = solve_gpfq(layer.W, layer.H, layer.G, layer.order, layer.fmt, rule)
    np.testing.assert_array_equal(got.codes.numpy(), explicit_gpfq(layer, rule, layer.X))
    same = solve_gpfq(layer.W, layer.H, None, layer.order, layer.fmt, blind)
    np.testing.assert_array_equal(same.codes.numpy(), explicit_gpfq(layer, blind, layer.Xq))


def test_gpfq_offers_the_scale_rule_the_loss_of_its_block() -> None:
    layer, rule = Layer(5, 3, 24, "INT3_G8", ordered=True), DrawnScales()
    V = solve_gpfq(layer.W, layer.H, layer.G, layer.order, layer.fmt, rule).dequantize().numpy()
    X, Xq, W = layer.in_order()
    rng = np.random.default_rng(0)
    for k, problem in enumerate(rule.problems):
        before, part = slice(0, 8 * k), slice(8 * k, 8 * k + 8)
        M = problem.metric.numpy()
        for r in range(3):
            u = X[:, before] @ W[r, before] - Xq[:, before] @ V[r, layer.columns[before]]
            aim = [
                Xq[:, t] @ (u + X[:, t] * W[r, t]) / (Xq[:, t] @ Xq[:, t])
                for t in range(part.start, part.stop)
            ]
            np.testing.assert_allclose(problem.weights[r].numpy(), aim, rtol=1e-9, atol=1e-12)
            wanted = u + X[:, part] @ W[r, part]
            b = problem.b[r].numpy()
            for v in rng.standard_normal((4, 8)):
                loss = ((wanted - Xq[:, part] @ v) ** 2).sum()
                assert v @ M @ v - 2 * v @ b == pytest.approx(loss - wanted @ wanted, rel=1e-9)


def test_rows_of_zeros_stay_zeros() -> None:
    layer = Layer(6, 4, 64, "INT4_G16", ordered=True)
    layer.W[1] = 0
    H, G, factor, order, fmt = layer.H, layer.G, layer.factor, layer.order, layer.fmt
    drift = gptaq_drift(H, G, factor)
    for quantized in (
        layer.gptq(layer.W, absmax, drift),
        solve_qronos(layer.W, H, G, factor, order, fmt, absmax),
        solve_gpfq(layer.W, H, G, order, fmt, absmax),
    ):
        values = quantized.dequantize()
        assert not values[1].any()
        assert values[0].any()
