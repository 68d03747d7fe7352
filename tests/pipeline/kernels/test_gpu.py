"""The Triton kernels agree with their plain form, on a GPU or under Triton's interpreter.

Run with TRITON_INTERPRET=1 they need no GPU, and are smaller because that is slow.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from pipeline.kernels.gpu import (
    affine,
    columns,
    common,
    descent,
    sub_scales,
    sweep,
    wide_sweep,
)
from pipeline.kernels.twin import affine as plain_affine
from pipeline.kernels.twin import columns as plain_columns
from pipeline.kernels.twin import descent as plain_descent
from pipeline.kernels.twin import sub_scales as plain_sub_scales
from pipeline.kernels.twin import sweep as plain_sweep
from pipeline.quantization.formats import Format, get_format
from pipeline.quantization.scales.hierarchical import integer_ranges
from tests.pipeline.quantization.problems import GRIDS, correlated, energy, scan, weights

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ]
)
ANY_REAL = (53, -1074, float("inf"))
FP16 = (11, -24, 65504.0)
COARSE = (2, -6, 0.25)
SHAPES = [(6, 12, 4)] if INTERPRETED else [(6, 12, 4), (999, 96, 32), (64, 256, 128)]
"""Rows, columns and group size of blocks."""


def many(few: int, on_gpu: int) -> int:
    return few if INTERPRETED else on_gpu


def put(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.tensor(np.ascontiguousarray(a), device=DEVICE) for a in arrays]


def rows_of_all_kinds(seed: int, rows: int, width: int, grid: np.ndarray) -> tuple[np.ndarray, ...]:
    """Weights with ties, equal values and zeros among them, H and b of a mismatched stream."""
    rng = np.random.default_rng(seed)
    X = correlated(rng, width)
    Xq = X + 0.2 * np.abs(X).mean() * rng.standard_normal(X.shape)
    W = np.stack([weights(rng, width, (r + 1) % 5) for r in range(rows)])
    if 0 in (grid[1:] + grid[:-1]):
        W[W == 0] = 0.5
    return W, Xq.T @ Xq, W @ (X.T @ Xq)


def ceiling_of(problem: tuple[np.ndarray, ...]) -> Tensor:
    """``b' H^-1 b`` of every row, with some slack, and no bound for the last row."""
    _, H, B = problem
    values = 1.001 * (B.T * np.linalg.solve(H, B.T)).sum(0)
    values[-1] = np.inf
    return put(values)[0]


def check_sweep(
    problem: tuple[np.ndarray, ...],
    grid: np.ndarray,
    signed: bool,
    clamp: bool,
    limits: tuple[int, int, float],
) -> None:
    """Pruned or not, the plain form without pruning finds the same objective and values.

    Not the same codes: in constant rows, or with FP4 at twice the scale, other codes are the same
    values, and sums in another order break the tie.
    """
    tensors = put(*problem, grid)
    scales, indices, objective = plain_sweep.piso_sweep(*tensors, signed, clamp, *limits)
    values = scales[:, None] * tensors[3][indices]
    for ceiling in (None, ceiling_of(problem)) if clamp else (None,):
        got = sweep.piso_sweep(*tensors, signed, clamp, *limits, ceiling)
        torch.testing.assert_close(got[2], objective, rtol=1e-9, atol=0)
        found = got[0][:, None] * tensors[3][got[1]]
        torch.testing.assert_close(found, values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", GRIDS)
def test_sweep_equals_its_plain_form(name: str, signed: bool) -> None:
    for width in (1, 4) if INTERPRETED else (1, 6, 16, 32, 64, 128, 256):
        problem = rows_of_all_kinds(width, many(5, 200), width, GRIDS[name])
        check_sweep(problem, GRIDS[name], signed, True, ANY_REAL)


@pytest.mark.parametrize("limits", [FP16, COARSE], ids=["fp16", "coarse"])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("name", ["int2", "int4", "iq4_nl"])
def test_sweep_on_lattices_equals_its_plain_form(
    name: str, clamp: bool, limits: tuple[int, int, float]
) -> None:
    width = many(5, 32)
    problem = rows_of_all_kinds(3, many(5, 500), width, GRIDS[name])
    check_sweep(problem, GRIDS[name], True, clamp, limits)


def test_sweep_is_never_worse_than_a_scan_of_scales() -> None:
    grid = GRIDS["int3"]
    W, H, B = rows_of_all_kinds(7, 5, 5, grid)
    scales, indices, objective = (
        t.cpu().numpy() for t in sweep.piso_sweep(*put(W, H, B, grid), True, True, *ANY_REAL)
    )
    for r in range(5):
        reached = energy(scales[r] * grid[indices[r]], H, B[r])
        assert reached == pytest.approx(objective[r], rel=1e-9, abs=1e-12)
        assert objective[r] <= scan(W[r], H, B[r], grid, True) + 1e-9 * abs(objective[r])


@pytest.mark.parametrize("widest", [0, 256], ids=["chunked", "merged"])
@pytest.mark.parametrize("pull", [-0.3, 0.3])
@pytest.mark.parametrize("grid", [[-1.5, -0.5, 0.5, 1.5], [-2.5, -1.5, -0.5, 0.5]])
def test_sweep_of_a_zero_between_two_levels(
    grid: list[float], pull: float, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The side that a zero takes is a convention; a pull to either side shows a broken one."""
    monkeypatch.setattr(sweep, "WIDEST_GROUP", widest)
    W = np.array([[0.0, 1.0, -0.7], [0.0, -1.0, 0.7], [0.0, 0.0, 0.0]])
    H = np.eye(3) + 0.1
    check_sweep((W, H, W @ H + np.array([pull, 0, 0])), np.array(grid), True, False, ANY_REAL)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("name", ["int2", "half levels", "fp4"])
def test_chunked_sweep_equals_its_plain_form(
    name: str, clamp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = many(9, 65)
    monkeypatch.setattr(sweep, "WIDEST_GROUP", 0)
    monkeypatch.setattr(wide_sweep, "CHUNK", many(8, 16))
    monkeypatch.setattr(wide_sweep, "SLICE", many(4, 16))
    monkeypatch.setattr(wide_sweep, "EVENTS_AT_ONCE", many(16, 150) * width)
    problem = rows_of_all_kinds(11, many(6, 200), width, GRIDS[name])
    for limits in (ANY_REAL, FP16):
        check_sweep(problem, GRIDS[name], True, clamp, limits)


def test_the_bound_of_the_chunked_sweep_is_exact_for_one_clipped_weight() -> None:
    """w = h = b = 1 at scale 0.1 on levels up to 1: v is 0.1, so nothing below reaches -0.19."""
    one = torch.ones(1, 1, dtype=torch.float64)
    bound = wide_sweep._Bound(one, one, torch.tensor(GRIDS["int2"]), 0 * one)
    row, scale = torch.zeros(1, dtype=torch.int64), torch.tensor([0.1], dtype=torch.float64)
    for best, expected in ((-0.19001, True), (-0.18999, False)):
        reached = torch.tensor([best], dtype=torch.float64)
        assert bound.hopeless(row, scale, 1.000001 * one[0], reached).item() is expected


@pytest.mark.skipif(INTERPRETED, reason="too slow without a GPU")
@pytest.mark.parametrize("width", [300, 1024])
def test_sweep_of_wide_rows(width: int) -> None:
    """Long sums in another order: equal but for scales whose objectives tie at rounding level."""
    grid = GRIDS["int4"]
    problem = rows_of_all_kinds(13, 40, width, grid)
    tensors = put(*problem, grid)
    got = sweep.piso_sweep(*tensors, True, True, *FP16)
    scales, indices, objective = plain_sweep.piso_sweep(*tensors, True, True, *FP16)
    torch.testing.assert_close(got[2], objective, rtol=1e-9, atol=0)
    same = got[0] == scales
    assert same.float().mean() > 0.7
    assert torch.equal(got[1][same], indices[same])
    for scale, index, reached in (got, (scales, indices, objective)):
        values = scale[:, None] * tensors[3][index]
        energies = ((values @ tensors[1] - 2 * tensors[2]) * values).sum(1)
        torch.testing.assert_close(energies, reached, rtol=1e-9, atol=0)
    pruned = sweep.piso_sweep(*tensors, True, True, *FP16, ceiling_of(problem))
    torch.testing.assert_close(pruned[2], objective, rtol=1e-9, atol=0)


def factor_of(rng: np.random.Generator, width: int) -> np.ndarray:
    X = correlated(rng, width)
    H = X.T @ X + 1e-2 * np.eye(width)
    return np.linalg.cholesky(np.linalg.inv(H)).T


def columns_problem(
    rows: int, width: int, group: int, grid: np.ndarray, affine: bool
) -> list[Tensor]:
    rng = np.random.default_rng(rows + width)
    W = rng.standard_t(4, (rows, width))
    reach = np.abs(W).reshape(rows, -1, group).max(2)
    scales = reach / np.abs(grid).max()
    scales[1] = 0
    scales[2] *= -1
    offsets = 0.3 * rng.standard_normal(scales.shape) if affine else np.zeros_like(scales)
    return put(W, factor_of(rng, width), scales, offsets, grid)


@pytest.mark.parametrize("with_drift", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounded_columns_are_the_same_in_float64(
    shape: tuple[int, int, int], affine: bool, with_drift: bool
) -> None:
    problem = columns_problem(*shape, GRIDS["int3"], affine)
    P = 0.1 * torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(0)).double()
    drift = P.triu(1).to(DEVICE) if with_drift else None
    got = columns.round_columns(*problem, shape[2], drift)
    indices, errors = plain_columns.round_columns(*problem, shape[2], drift)
    assert torch.equal(got[0], indices)
    torch.testing.assert_close(got[1], errors, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["int4", "q2_0", "iq4_nl"])
def test_rounded_columns_in_float32(name: str) -> None:
    shape = (many(8, 4096), many(16, 128), many(8, 32))
    problem = [t.float() for t in columns_problem(*shape, GRIDS[name], False)]
    got = columns.round_columns(*problem, shape[2])
    indices, errors = plain_columns.round_columns(*problem, shape[2])
    assert (got[0] == indices).float().mean() >= 0.9999
    assert got[1].dtype == torch.float32
    ratio = got[1].double().square().sum() / errors.double().square().sum()
    assert ratio.item() == pytest.approx(1, abs=1e-5)


def test_a_midpoint_rounds_to_the_upper_level() -> None:
    values, grid = np.array([[0.5, -0.5, 1.5, 9.0, -9.0]]), GRIDS["int3"]
    one = np.ones((1, 1))
    indices, _ = columns.round_columns(*put(values, np.eye(5), one, 0 * one, grid), 5)
    assert grid[indices[0].cpu().numpy()].tolist() == [1.0, 0.0, 2.0, 3.0, -4.0]


def descent_problem(
    rows: int, width: int, group: int, grid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Level indices, scales, offsets, b and H."""
    rng = np.random.default_rng(rows * width)
    X = correlated(rng, width)
    H = X.T @ X + 1e-2 * np.eye(width)
    W = rng.standard_normal((rows, width))
    scales = np.abs(W).reshape(rows, -1, group).max(2) / np.abs(grid).max()
    scales[0] = 0
    scales[1] *= -1
    offsets = 0.1 * rng.standard_normal(scales.shape)
    return rng.integers(0, len(grid), W.shape), scales, offsets, W @ H, H


@pytest.mark.parametrize("shape", SHAPES)
def test_descent_equals_its_plain_form_and_descends(shape: tuple[int, int, int]) -> None:
    grid = GRIDS["fp4"]
    codes, scales, offsets, B, H = descent_problem(*shape, grid)
    spread = [np.repeat(a, shape[2], 1) for a in (scales, offsets)]
    before = spread[0] * grid[codes] + spread[1]
    problem = put(codes, scales, offsets, B - before @ H, H, grid)
    found, delta = descent.descend(*problem, shape[2])
    expected, expected_delta = plain_descent.descend(*problem, shape[2])
    assert torch.equal(found, expected)
    torch.testing.assert_close(delta, expected_delta, rtol=1e-12, atol=0)
    after = spread[0] * grid[found.cpu().numpy()] + spread[1]
    np.testing.assert_allclose(after - before, delta.cpu().numpy(), atol=1e-12)
    changes = [energy(a, H, b) - energy(o, H, b) for a, o, b in zip(after, before, B, strict=True)]
    assert changes[0] == 0
    assert max(changes[1:]) < 0


def test_descent_in_float32() -> None:
    shape, grid = (many(6, 2000), many(12, 128), many(4, 32)), GRIDS["int4"]
    codes, scales, offsets, B, H = descent_problem(*shape, grid)
    problem = put(codes, scales, offsets, B - (B * 0), H, grid)
    singles = [t.float() if t.is_floating_point() else t for t in problem]
    found, delta = descent.descend(*singles, shape[2])
    expected, expected_delta = plain_descent.descend(*singles, shape[2])
    assert delta.dtype == torch.float32
    same = found == expected
    assert same.float().mean() >= 0.9999
    torch.testing.assert_close(delta[same], expected_delta[same], rtol=1e-5, atol=0)


@pytest.mark.parametrize("limits", [ANY_REAL, FP16, COARSE], ids=["real", "fp16", "coarse"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["int3", "q2_0", "iq4_nl"])
def test_free_fit_equals_its_plain_form(
    name: str, signed: bool, limits: tuple[int, int, float]
) -> None:
    grid, width = GRIDS[name], many(5, 32)
    codes, _, _, B, H = descent_problem(many(5, 500), width, width, grid)
    codes[2] = np.abs(grid).argmin()
    B[3] = 0
    got = descent.fit_free(*put(codes, B, H, grid), 3, *limits, signed)
    expected = plain_descent.fit_free(*put(codes, B, H, grid), 3, *limits, signed)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(got[2], expected[2], rtol=1e-9, atol=0)


def test_free_fit_ends_where_no_single_move_helps() -> None:
    grid = GRIDS["int2"]
    codes, _, _, B, H = descent_problem(6, 5, 5, grid)
    out = descent.fit_free(*put(codes, B, H, grid), 50, *ANY_REAL, True)
    scales, indices, objective = (t.cpu().numpy() for t in out)
    for r in range(6):
        q = grid[indices[r]]
        reached = energy(scales[r] * q, H, B[r])
        assert reached == pytest.approx(objective[r], rel=1e-9, abs=1e-12)
        for i in range(5):
            for level in grid:
                moved = q.copy()
                moved[i] = level
                if moved.any():
                    best = -((moved @ B[r]) ** 2) / (moved @ H @ moved)
                    assert objective[r] <= best + 1e-9 * abs(best)


@triton.jit
def _steps(  # type: ignore[no-untyped-def]
    values, steps, BITS: tl.constexpr, LEAST: tl.constexpr
):
    i = tl.program_id(0)
    tl.store(steps + i, common.lattice_step(tl.load(values + i), BITS, LEAST))


@pytest.mark.parametrize(("bits", "least"), [(53, -1074), (11, -24), (1, -1074), (8, -133)])
def test_steps_of_a_lattice(bits: int, least: int) -> None:
    values = [1.0, 2.0, 0.75, 65504.0, 1.7e308, 2.0**-1022, 2.0**-1023, 5e-324, 3e-310, 1e-7]
    values += [math.nextafter(4.0, 0.0), math.nextafter(4.0, 5.0), 2.0**-24, 2.0**-14]
    inputs = torch.tensor(values, dtype=torch.float64, device=DEVICE)
    got = torch.empty_like(inputs)
    _steps[(len(values),)](inputs, got, bits, least)
    expected = [math.ldexp(1.0, max(math.frexp(v)[1] - bits, least)) for v in values]
    assert got.tolist() == expected


def test_no_rows() -> None:
    grid = GRIDS["int2"]
    empty, H = np.zeros((0, 4)), np.eye(4)
    assert sweep.piso_sweep(*put(empty, H, empty, grid), True, True, *FP16)[1].shape == (0, 4)
    none = np.zeros((0, 1))
    assert columns.round_columns(*put(empty, H, none, none, grid), 4)[0].shape == (0, 4)


def sub_scale_problem(fmt: Format, rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Reals (w, M, c, d, dmin) and integers (sc, mn, level indices) of one group."""
    width, (sub_scales, sub_offsets) = fmt.group_size, integer_ranges(fmt)
    rng = np.random.default_rng(width + rows)
    X = correlated(rng, width)
    M = X.T @ X + 1e-2 * np.eye(width)
    W = rng.standard_t(4, (rows, width)) + 0.3
    reach = np.abs(W).max(1) / np.abs(fmt.grid.numpy()).max()
    d, dmin = reach / 9, reach / 7
    d[1], dmin[2], d[3] = 0, 0, -d[3]
    if not sub_offsets[1]:
        dmin[:] = 0
    sc = np.full(rows, min(8, sub_scales[1]))
    mn = np.full(rows, min(3, sub_offsets[1]))
    codes = rng.integers(0, len(fmt.grid), W.shape)
    return put(W, M, W @ M + rng.standard_normal(W.shape), d, dmin), put(sc, mn, codes)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_sub_scales_equal_their_plain_form(name: str, given: bool) -> None:
    fmt = get_format(name)
    reals, integers = sub_scale_problem(fmt, many(5, 1000))
    grid, rest = fmt.grid.to(DEVICE), (*integer_ranges(fmt), many(1, 2), many(1, 4))
    got = sub_scales.fit_sub_scales(*reals, *integers, given, grid, *rest)
    expected = plain_sub_scales.fit_sub_scales(*reals, *integers, given, grid, *rest)
    for found, plain in zip(got[:3], expected[:3], strict=True):
        assert torch.equal(found, plain)
    torch.testing.assert_close(got[3], expected[3], rtol=1e-10, atol=1e-10)
    sc, mn, codes = (t.double() for t in got[:3])
    v = (reals[3] * sc)[:, None] * grid[codes.long()] - (reals[4] * mn)[:, None]
    reached = ((v @ reals[1] - 2 * reals[2]) * v).sum(1)
    torch.testing.assert_close(reached, got[3], rtol=1e-9, atol=1e-9)


def affine_problem(rows: int, width: int) -> list[Tensor]:
    """Weights with ties, M and b; in two rows all weights are equal."""
    W, M, _ = rows_of_all_kinds(width, rows, width, np.arange(4.0))
    rng = np.random.default_rng(width)
    return put(W, M, W @ M + rng.standard_normal(W.shape))


def affine_energy(problem: list[Tensor], scale: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
    v = scale[:, None] * codes.double() + offset[:, None]
    return ((v @ problem[1] - 2 * problem[2]) * v).sum(1)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize(
    ("levels", "width"), [(4, 4), (16, 5)] if INTERPRETED else [(4, 16), (16, 32)]
)
def test_affine_lines_equal_their_plain_form(levels: int, width: int, anchored: bool) -> None:
    rows = many(4, 300)
    W, M, b = affine_problem(rows, width)
    u = levels / (W.amax(1) - W.amin(1) + 0.1)
    start = -u * W.amin(1)
    slopes = put(np.random.default_rng(levels).standard_normal((rows, 2)))[0]
    upwards = torch.stack([u, start, 0 * u, 0 * u + 1], dim=1)
    slanted = torch.cat([torch.stack([u, start], dim=1), slopes], dim=1)
    walks = torch.stack([upwards, slanted], dim=1)
    at = torch.full((rows, 2), -1, device=W.device)
    if anchored:
        at[:, 1] = torch.arange(rows, device=W.device) % width
    least = 1e-11 * float(M.diagonal().sum())
    arguments = (W, M, b, float(levels - 1), walks, at, least)
    gains, codes = affine.affine_lines(*arguments)
    expected, _ = plain_affine.affine_lines(*arguments)
    torch.testing.assert_close(gains, expected, rtol=1e-9, atol=1e-12)
    # Codes of equal weights tie; what counts is that they reach the gain.
    q = codes.double()
    alpha, beta = (q * b).sum(1), ((q @ M) * q).sum(1)
    reached = torch.where(gains > 0, alpha.square() / beta.clamp_min(1e-300), 0.0)
    torch.testing.assert_close(reached, gains, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "limits", [(53, -1074, -float("inf"), float("inf")), (11, -24, 0.0, 65504.0)]
)
def test_affine_offsets_equal_their_plain_form(limits: tuple[int, int, float, float]) -> None:
    width, top = many(5, 32), 15.0
    problem = affine_problem(many(4, 300), width)
    reach = problem[0].amax(1, keepdim=True) - problem[0].amin(1, keepdim=True) + 0.1
    scales = torch.cat([reach / top, -0.8 * reach / top, 0 * reach], dim=1)
    got = affine.affine_offsets(*problem, top, scales, *limits)
    expected = plain_affine.affine_offsets(*problem, top, scales, *limits)
    torch.testing.assert_close(got[3], expected[3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(affine_energy(problem, *got[:3]), got[3], rtol=1e-9, atol=1e-9)
