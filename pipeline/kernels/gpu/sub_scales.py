"""Sub-scales of one group in Triton. The contract is in `pipeline.kernels.sub_scales`.

One warp holds one row. Its levels, midpoints and the lines of the metric come from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.gpu.common import (
    block_of,
    load_midpoints,
    matrix_vector,
    nearest,
    on_device_of,
    pick,
)
from pipeline.kernels.twin.descent import LEAST_GAIN


@triton.jit
def _values(index, d, dmin, sc, mn, levels, inside):  # type: ignore[no-untyped-def]
    level = tl.load(levels + index, mask=inside, other=0.0)
    value = d * sc.to(tl.float64) * level - dmin * mn.to(tl.float64)
    return tl.where(inside, value, 0.0)


@triton.jit
def _energy(index, d, dmin, sc, mn, levels, linear, metric, columns, inside, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    v = _values(index, d, dmin, sc, mn, levels, inside)
    return tl.sum(v * (matrix_vector(metric, v, columns, inside, WIDTH) - 2 * linear), 0)


@triton.jit
def _rounded(weights, scale, offset, levels, count):  # type: ignore[no-untyped-def]
    """Nearest level of every weight; a tie goes to the upper one."""
    ratio = tl.where(scale == 0, 0.0, (weights - offset) / tl.where(scale == 0, 1.0, scale))
    index = tl.zeros_like(ratio).to(tl.int32)
    low = tl.load(levels)
    for k in range(1, count):
        high = tl.load(levels + k)
        index += ((low + high) / 2.0 <= ratio).to(tl.int32)
        low = high
    return index


@triton.jit
def _descended(  # type: ignore[no-untyped-def]
    index, d, dmin, sc, mn, levels, midpoints, linear, metric, columns, inside, WIDTH: tl.constexpr
):
    """One pass of coordinate descent on the codes."""
    scale = d * sc.to(tl.float64)
    safe = tl.where(scale == 0, 1.0, scale)
    v = _values(index, d, dmin, sc, mn, levels, inside)
    gradient = linear - matrix_vector(metric, v, columns, inside, WIDTH)
    for i in range(WIDTH):
        here = columns == i
        old = tl.load(levels + tl.sum(tl.where(here, index, 0), 0))
        pull = pick(gradient, here)
        diagonal = tl.load(metric + i * WIDTH + i)
        new = nearest(old + pull / diagonal / safe, midpoints)
        step = scale * (tl.load(levels + new) - old)
        if step * (step * diagonal - 2 * pull) < 0:
            gradient -= step * tl.load(metric + i * WIDTH + columns, mask=inside, other=0.0)
            index = tl.where(here, new, index)
    return index


@triton.jit
def _nearest_integer(x):  # type: ignore[no-untyped-def]
    """Round to nearest, ties to even."""
    upper = tl.floor(x + 0.5)
    odd = upper - 2 * tl.floor(upper / 2) == 1
    return tl.where((upper - x == 0.5) & odd, upper - 1, upper)


@triton.jit
def _best_pair(  # type: ignore[no-untyped-def]
    index,
    d,
    dmin,
    mn,
    levels,
    linear,
    metric,
    columns,
    inside,
    lowest,
    highest,
    least,
    most,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The best of all pairs for fixed codes."""
    q = tl.load(levels + index, mask=inside, other=0.0)
    product = matrix_vector(metric, q, columns, inside, WIDTH)
    row_sums = matrix_vector(metric, tl.where(inside, 1.0, q), columns, inside, WIDTH)
    qq, q1, total = tl.sum(q * product, 0), tl.sum(product, 0), tl.sum(row_sums, 0)
    qc, one_c = tl.sum(q * linear, 0), tl.sum(linear, 0)
    k = tl.arange(0, PAIRS)
    sc = lowest + k
    s = d * sc.to(tl.float64)
    vertex = (s * q1 - one_c) / total / tl.where(dmin == 0, 1.0, dmin)
    wanted = tl.minimum(tl.maximum(_nearest_integer(vertex), least), most)
    m = tl.where(dmin == 0, s * 0.0 + mn.to(tl.float64), wanted)
    o = -dmin * m
    value = s * (s * qq + 2 * o * q1 - 2 * qc) + o * (o * total - 2 * one_c)
    value = tl.where(sc <= highest, value, float("inf"))
    place = tl.min(tl.where(value == tl.min(value, 0), k, PAIRS - 1), 0)
    return lowest + place, tl.sum(tl.where(k == place, m, 0.0), 0).to(tl.int32)


@triton.jit
def _polish(  # type: ignore[no-untyped-def]
    index,
    sc,
    mn,
    energy,
    d,
    dmin,
    levels,
    midpoints,
    linear,
    metric,
    columns,
    inside,
    lowest,
    highest,
    least,
    most,
    sweeps,
    GAIN: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Alternate codes and pair until neither helps."""
    sweep, moves = 0, 1
    while (sweep < sweeps) & (moves > 0):
        moves = 0
        tried = _descended(
            index, d, dmin, sc, mn, levels, midpoints, linear, metric, columns, inside, WIDTH
        )
        found = _energy(tried, d, dmin, sc, mn, levels, linear, metric, columns, inside, WIDTH)
        if found < energy - GAIN * tl.abs(energy):
            index, energy, moves = tried, found, 1
        s, m = _best_pair(
            *(index, d, dmin, mn, levels, linear, metric, columns, inside),
            *(lowest, highest, least, most, PAIRS, WIDTH),
        )
        found = _energy(index, d, dmin, s, m, levels, linear, metric, columns, inside, WIDTH)
        if found < energy - GAIN * tl.abs(energy):
            sc, mn, energy, moves = s, m, found, 1
        sweep += 1
    return index, sc, mn, energy


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    w,
    sc,
    mn,
    d,
    dmin,
    levels,
    linear,
    metric,
    columns,
    inside,
    count,
    lowest,
    highest,
    least,
    most,
    REACH: tl.constexpr,
    SIDEWAYS: tl.constexpr,
    GAIN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The best of all pairs around the start under round to nearest."""
    best_sc, best_mn = sc, mn
    best = tl.full((), float("inf"), tl.float64)
    index = tl.zeros_like(w).to(tl.int32)
    for n in range((2 * REACH + 1) * (2 * SIDEWAYS + 1)):
        ds, dm = n // (2 * SIDEWAYS + 1) - REACH, n % (2 * SIDEWAYS + 1) - SIDEWAYS
        s = tl.minimum(tl.maximum(sc + ds, lowest), highest)
        m = tl.minimum(tl.maximum(mn + dm, least), most)
        tried = _rounded(w, d * s.to(tl.float64), -dmin * m.to(tl.float64), levels, count)
        energy = _energy(tried, d, dmin, s, m, levels, linear, metric, columns, inside, WIDTH)
        # inf - inf would compare as false
        margin = tl.where(best == float("inf"), 0.0, GAIN * tl.abs(best))
        if energy < best - margin:
            best, best_sc, best_mn, index = energy, s, m, tried
    return index, best_sc, best_mn, best


@triton.jit
def _fit_row(  # type: ignore[no-untyped-def]
    weights,
    metric,
    linear,
    supers,
    super_offsets,
    scales,
    offsets,
    indices,
    levels,
    scales_out,
    offsets_out,
    found_out,
    objective_out,
    count,
    lowest,
    highest,
    least,
    most,
    sweeps,
    GIVEN: tl.constexpr,
    REACH: tl.constexpr,
    SIDEWAYS: tl.constexpr,
    GAIN: tl.constexpr,
    PAIRS: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    w = tl.load(weights + row * WIDTH + columns, mask=inside, other=0.0)
    c = tl.load(linear + row * WIDTH + columns, mask=inside, other=0.0)
    d, dmin = tl.load(supers + row), tl.load(super_offsets + row)
    sc = tl.load(scales + row).to(tl.int32)
    mn = tl.load(offsets + row).to(tl.int32)
    midpoints = load_midpoints(levels, count, LEVELS)
    index, best_sc, best_mn, best = _search(
        *(w, sc, mn, d, dmin, levels, c, metric, columns, inside, count),
        *(lowest, highest, least, most, REACH, SIDEWAYS, GAIN, WIDTH),
    )
    index, best_sc, best_mn, best = _polish(
        *(index, best_sc, best_mn, best, d, dmin, levels, midpoints, c, metric, columns, inside),
        *(lowest, highest, least, most, sweeps, GAIN, PAIRS, WIDTH),
    )
    if GIVEN:
        old = tl.load(indices + row * WIDTH + columns, mask=inside, other=0).to(tl.int32)
        energy = _energy(old, d, dmin, sc, mn, levels, c, metric, columns, inside, WIDTH)
        old, s, m, energy = _polish(
            *(old, sc, mn, energy, d, dmin, levels, midpoints, c, metric, columns, inside),
            *(lowest, highest, least, most, sweeps, GAIN, PAIRS, WIDTH),
        )
        if (best < energy - GAIN * tl.abs(energy)) == 0:
            index, best_sc, best_mn, best = old, s, m, energy
    tl.store(scales_out + row, best_sc.to(tl.int64))
    tl.store(offsets_out + row, best_mn.to(tl.int64))
    tl.store(objective_out + row, best)
    tl.store(found_out + row * WIDTH + columns, index.to(tl.int64), mask=inside)


def fit_sub_scales(
    weights: Tensor,
    metric: Tensor,
    linear: Tensor,
    d: Tensor,
    dmin: Tensor,
    sc: Tensor,
    mn: Tensor,
    indices: Tensor,
    given: bool,
    levels: Tensor,
    scale_range: tuple[int, int],
    offset_range: tuple[int, int],
    reach: int,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.fit_sub_scales`; reals float64, integers int64, all contiguous."""
    rows, width = weights.shape
    out = (torch.empty_like(sc), torch.empty_like(mn), torch.empty_like(indices))
    objective = weights.new_empty(rows)
    sideways = reach if offset_range[1] > offset_range[0] else 0
    pairs = triton.next_power_of_2(scale_range[1] - scale_range[0] + 1)
    if rows:
        with on_device_of(weights):
            _fit_row[(rows,)](
                *(weights, metric, linear, d, dmin, sc, mn, indices, levels, *out, objective),
                *(len(levels), *scale_range, *offset_range, sweeps),
                *(given, reach, sideways, LEAST_GAIN, max(pairs, 2)),
                *(block_of(len(levels)), block_of(width), width),
                num_warps=1,
                enable_fp_fusion=False,
            )
    return *out, objective
