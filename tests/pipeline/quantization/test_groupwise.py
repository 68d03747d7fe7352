"""Groups one after the other: brute force on a coarse lattice, the numpy oracle, monotony."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.quantization.formats import FP32, Format, get_format, integer_format
from pipeline.quantization.objective import LayerObjective
from pipeline.quantization.rounding import groupwise
from pipeline.quantization.rounding.groupwise import solve_groupwise
from pipeline.quantization.rounding.nearest import solve_nearest
from pipeline.quantization.scales import SCALE_RULES, absmax, mse, piso
from tests.pipeline.quantization.problems import correlated, energy, nearest_codes, weights
from tests.pipeline.quantization.test_piso import (
    TINY,
    TINY_POINTS,
    needs_oracle,
    shared_oracle,
)


def layer(seed: int, rows: int, width: int, *, mismatch: bool = False):
    """Float weights, their objective, and its target; rows with ties, equal and zero weights."""
    rng = np.random.default_rng(seed)
    X = correlated(rng, width, 3 * width)
    Xq = X + (0.15 * np.abs(X).mean() * rng.standard_normal(X.shape) if mismatch else 0)
    W = torch.tensor(np.stack([weights(rng, width, r % 6) for r in range(rows)]))
    objective = LayerObjective.from_moments(
        torch.tensor(Xq.T @ Xq), torch.tensor(Xq.T @ X), damping=1e-3
    )
    return W, objective, objective.target(W)


def by_mass(H: np.ndarray, block: int) -> list[int]:
    return np.argsort(-np.diag(H).reshape(-1, block).sum(1), kind="stable").tolist()


def best_by_force(w, H, b, grid) -> tuple[float, np.ndarray]:
    """Smallest energy and its values over the tiny lattice of both signs, codes nearest to w."""
    best, values = 0.0, np.zeros(len(w))
    for s in [*TINY_POINTS, *(-p for p in TINY_POINTS)]:
        for q in nearest_codes(w, s, grid):
            found = energy(s * q, H, b)
            if found < best:
                best, values = found, s * q
    return best, values


@pytest.mark.parametrize("mismatch", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_one_pass_is_the_best_of_every_group_given_those_before_it(
    bits: int, mismatch: bool
) -> None:
    fmt = integer_format(bits, 4, TINY)
    W, objective, T = layer(bits, 12, 16, mismatch=mismatch)
    H, grid = objective.hessian.numpy(), fmt.grid.numpy()
    got = solve_groupwise(T, objective.hessian, fmt, piso, rounded=W).dequantize().double()
    losses = objective.loss(got, T)
    for r in range(12):
        w, t = W[r].numpy(), T[r].numpy()
        v = w.copy()
        for g in by_mass(H, 4):
            part = slice(4 * g, 4 * g + 4)
            others = np.delete(np.arange(16), np.r_[part])
            linear = (H @ t)[part] - H[part][:, others] @ v[others]
            v[part] = best_by_force(w[part], H[part, part], linear, grid)[1]
        assert losses[r].item() == pytest.approx((v - t) @ H @ (v - t), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("mismatch", [False, True])
def test_more_passes_end_where_no_single_group_can_improve(mismatch: bool) -> None:
    fmt = integer_format(2, 4, TINY)
    W, objective, T = layer(7, 12, 12, mismatch=mismatch)
    H, grid = objective.hessian.numpy(), fmt.grid.numpy()
    got = solve_groupwise(T, objective.hessian, fmt, piso, rounded=W, passes=60)
    V = got.dequantize().double().numpy()
    for r, g in itertools.product(range(12), range(3)):
        part = slice(4 * g, 4 * g + 4)
        M, v = H[part, part], V[r, part]
        linear = (H @ (T[r].numpy() - V[r]))[part] + M @ v
        reached = energy(v, M, linear)
        for rounded in (W[r, part].numpy(), np.linalg.solve(M, linear)):
            best = best_by_force(rounded, M, linear, grid)[0]
            assert reached <= best + 1e-9 * abs(best)


def test_never_below_the_optimum_over_all_codes_and_scales_and_often_there() -> None:
    """Enumerates both groups of two weights: every scale of the lattice with every code."""
    fmt = integer_format(2, 2, TINY)
    _, objective, T = layer(3, 12, 4)
    H = objective.hessian
    scales = torch.tensor([*TINY_POINTS, *(-p for p in TINY_POINTS)], dtype=torch.float64)
    codes = torch.cartesian_prod(fmt.grid, fmt.grid)
    pair = (scales[:, None, None] * codes).reshape(-1, 2).unique(dim=0)
    losses = {
        passes: objective.loss(solve_groupwise(T, H, fmt, piso, passes=passes).dequantize(), T)
        for passes in (1, 20)
    }
    ratios = []
    for r in range(12):
        d1, d2 = pair - T[r, :2], pair - T[r, 2:]
        own = [((d @ H[p, p]) * d).sum(1) for d, p in ((d1, slice(0, 2)), (d2, slice(2, 4)))]
        best = (own[0][:, None] + own[1] + 2 * d1 @ H[:2, 2:] @ d2.T).min().item()
        assert losses[20][r] >= best - 1e-9
        assert losses[20][r] <= losses[1][r]
        if best > 1e-9:
            ratios.append(losses[20][r].item() / best)
    assert len(ratios) > 6
    assert min(ratios) < 1 + 1e-9


@needs_oracle
@pytest.mark.parametrize("mismatch", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
def test_equals_the_shared_oracle(clamp: bool, mismatch: bool) -> None:
    """Up to the rounding of its real scales to float32, which decides ties: rows without them."""
    oracle = shared_oracle()

    def rule(problem, fmt):
        return piso(problem, fmt, clamp=clamp)

    for seed, bits in itertools.product(range(4), (2, 3)):
        fmt = integer_format(bits, 4, FP32)
        W, objective, T = layer(seed, 6, 16, mismatch=mismatch)
        H, G = objective.hessian, objective.cross
        one = solve_groupwise(T, H, fmt, rule, rounded=W)
        more = solve_groupwise(T, H, fmt, rule, rounded=W, passes=5)
        for r in (0, 4, 5):
            arguments = (W[r].numpy(), H.numpy(), G.numpy(), fmt.grid.numpy(), 4)
            options = {"clamp": clamp, "negative": True}
            first = oracle.piso_sequential(*arguments, **options)[0]
            last = oracle.piso_cyclic(*arguments, passes=4, retarget=True, **options)[0]
            for got, expected in ((one, first), (more, last)):
                found = objective.loss(got.dequantize()[r : r + 1], T[r : r + 1]).item()
                wanted = objective.loss(torch.tensor(expected)[None], T[r : r + 1]).item()
                slack = 1e-6 * (T[r] @ H @ T[r]).item()
                assert found <= wanted + slack
                assert got is more or found >= wanted - slack


@pytest.mark.parametrize("name", ["INT2_G16", "Q2_0", "Q4_1", "Q6_K", "INT3"])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_no_row_gets_worse_in_any_pass(name: str, rule: str) -> None:
    fmt: Format = get_format(name)
    W, objective, T = layer(11, 6, 256, mismatch=True)
    losses = [
        objective.loss(
            solve_groupwise(
                T, objective.hessian, fmt, SCALE_RULES[rule], rounded=W, passes=passes
            ).dequantize(),
            T,
        )
        for passes in (1, 2, 3)
    ]
    for before, after in itertools.pairwise(losses):
        assert (after <= before * (1 + 1e-12)).all()
    assert losses[-1].sum() < losses[0].sum()


def test_the_expected_ranking() -> None:
    """Sequential beats independent groups, passes beat one pass, PiSO beats data-free scales."""
    fmt = get_format("INT2_G16")
    _, objective, T = layer(5, 24, 64)
    H = objective.hessian

    def total(quantized) -> float:
        return float(objective.loss(quantized.dequantize(), T).sum())

    independent = total(solve_nearest(T, H, fmt, piso))
    sequential = total(solve_groupwise(T, H, fmt, piso))
    cyclic = total(solve_groupwise(T, H, fmt, piso, passes=5))
    data_free = total(solve_groupwise(T, H, fmt, mse))
    assert cyclic < sequential < independent
    assert sequential < data_free


def test_rows_do_not_depend_on_how_they_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits where nothing ties. In tied rows the last bit of a matrix product, which depends on the
    batch on some processors, may choose between equally good codes."""
    fmt = get_format("INT3_G8")
    W, objective, T = layer(9, 11, 32, mismatch=True)
    untied = torch.tensor([r for r in range(11) if r % 6 not in (1, 2, 3)])

    def solve(chunk: int, passes: int):
        monkeypatch.setattr(groupwise, "ROW_CHUNK", chunk)
        return solve_groupwise(T, objective.hessian, fmt, piso, rounded=W, passes=passes)

    whole, parts = solve(1024, 3), solve(4, 3)
    assert torch.equal(whole.codes[untied], parts.codes[untied])
    assert torch.equal(whole.scales["d"][untied], parts.scales["d"][untied])
    losses = [objective.loss(solve(chunk, 1).dequantize(), T) for chunk in (1024, 4)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


def test_one_group_is_round_to_nearest() -> None:
    fmt = get_format("INT3")
    _, objective, T = layer(2, 6, 24)
    got = solve_groupwise(T, objective.hessian, fmt, piso)
    expected = solve_nearest(T, objective.hessian, fmt, piso)
    assert torch.equal(got.dequantize(), expected.dequantize())


def test_the_order_decides_who_sees_whom() -> None:
    fmt = get_format("INT2_G8")
    _, objective, T = layer(4, 6, 32)
    H = objective.hessian
    first = torch.tensor([2, 0, 3, 1])
    got = solve_groupwise(T, H, fmt, piso, order=first).dequantize()[:, 16:24]
    alone = solve_nearest(T[:, 16:24], H[16:24, 16:24], fmt, piso).dequantize()
    assert torch.equal(got, alone)
    default = solve_groupwise(T, H, fmt, piso)
    explicit = solve_groupwise(T, H, fmt, piso, order=torch.tensor(by_mass(H.numpy(), 8)))
    assert torch.equal(default.codes, explicit.codes)


def test_refuses_what_makes_no_sense() -> None:
    _, objective, T = layer(0, 2, 16)
    fmt = get_format("INT2_G8")
    with pytest.raises(InputError, match="0 passes"):
        solve_groupwise(T, objective.hessian, fmt, absmax, passes=0)
    for order in ([0], [0, 0], [0, 1, 2]):
        with pytest.raises(InputError, match="permutation"):
            solve_groupwise(T, objective.hessian, fmt, absmax, order=torch.tensor(order))
