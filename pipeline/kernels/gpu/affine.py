"""Affine codes along lines in Triton. The contracts are in `pipeline.kernels.affine`.

One warp walks one line of one row. It does not sort the crossings: every input knows its next one,
and the warp takes the earliest of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.gpu.common import (
    block_of,
    lattice_step,
    least_of,
    matrix_vector,
    on_device_of,
    pick,
)


@triton.jit
def _next_crossings(codes, place, speed, top):  # type: ignore[no-untyped-def]
    """When each input's code changes next; infinity if it never does."""
    rising, falling = (speed > 0) & (codes < top), (speed < 0) & (codes > 0)
    level = tl.where(rising, codes + 1, codes)
    time = (level - place) / tl.where(speed == 0, 1.0, speed)
    return tl.where(rising | falling, time, float("inf"))


@triton.jit
def _start(w, columns, inside, anchor, line, top):  # type: ignore[no-untyped-def]
    """Codes just after the start of a line, and where and how fast every input moves."""
    place = tl.load(line) * w + tl.load(line + 1) + 0.5
    speed = tl.where(inside, tl.load(line + 2) * w + tl.load(line + 3), 0.0)
    codes = tl.floor(place)
    # On a threshold the direction decides; parallel to it, the order of the columns does.
    after = (anchor >= 0) & (columns > anchor)
    down = (codes == place) & ((speed < 0) | ((speed == 0) & after))
    codes = tl.minimum(tl.maximum(codes - down.to(tl.float64), 0.0), top)
    return tl.where(inside, codes, 0.0), place, speed


@triton.jit
def _walk_line(  # type: ignore[no-untyped-def]
    weights,
    metric,
    linear,
    lines,
    anchors,
    gains_out,
    codes_out,
    least_curvature,
    top,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    row = line // LINES
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    w = tl.load(weights + row * WIDTH + columns, mask=inside, other=0.0)
    b = tl.load(linear + row * WIDTH + columns, mask=inside, other=0.0)
    anchor = tl.load(anchors + line).to(tl.int32)
    anchored, at_anchor = anchor >= 0, columns == anchor
    codes, place, speed = _start(w, columns, inside, anchor, lines + 4 * line, top)
    gradient = matrix_vector(metric, codes, columns, inside, WIDTH)
    alpha, beta = tl.sum(codes * b, 0), tl.sum(codes * gradient, 0)
    first = tl.maximum(anchor, 0)
    pull = tl.load(linear + row * WIDTH + first)
    weight = tl.load(metric + first * WIDTH + first)
    least = tl.load(least_curvature)
    best, kept = tl.full((), 0.0, tl.float64), tl.zeros_like(codes)
    settled, going = 1, 1
    time = tl.full((), 0.0, tl.float64)
    while going > 0:
        following, i = least_of(_next_crossings(codes, place, speed, top), columns)
        going = (following < float("inf")).to(tl.int32)
        if (settled > 0) | (following > time) | (going == 0):
            gain = alpha * alpha / tl.where(beta > least, beta, 1.0)
            if (beta > least) & (alpha > 0) & (gain > best):
                best, kept = gain, codes
            if anchored:
                lower = alpha - pull
                other = beta - 2 * pick(gradient, at_anchor) + weight
                gain = lower * lower / tl.where(other > least, other, 1.0)
                if (other > least) & (lower > 0) & (gain > best):
                    best, kept = gain, codes - at_anchor.to(tl.float64)
        if going > 0:
            here = columns == i
            step = tl.where(pick(speed, here) > 0, 1.0, -1.0).to(tl.float64)
            diagonal = tl.load(metric + i * WIDTH + i)
            alpha += step * tl.load(linear + row * WIDTH + i)
            beta += step * (2 * pick(gradient, here) + step * diagonal)
            gradient += step * tl.load(metric + i * WIDTH + columns, mask=inside, other=0.0)
            codes = tl.where(here, codes + step, codes)
        settled, time = 0, following
    tl.store(gains_out + line, best)
    tl.store(codes_out + line * WIDTH + columns, kept.to(tl.int32), mask=inside)


def _double(value: float, like: Tensor) -> Tensor:
    """A scalar in memory: Triton takes a Python float for a float32."""
    return torch.tensor(value, dtype=torch.float64, device=like.device)


def affine_lines(
    weights: Tensor,
    metric: Tensor,
    linear: Tensor,
    top: float,
    lines: Tensor,
    anchors: Tensor,
    least: float,
) -> tuple[Tensor, Tensor]:
    """See `pipeline.kernels.affine_lines`; `metric` and `linear` are reduced, reals float64."""
    (rows, width), count = weights.shape, lines.shape[1]
    gains = weights.new_empty(rows, count)
    codes = torch.empty(rows, count, width, dtype=torch.int32, device=weights.device)
    if rows and count:
        with on_device_of(weights):
            _walk_line[(rows * count,)](
                *(weights, metric, linear, lines, anchors, gains, codes),
                *(_double(least, weights), top, count, block_of(width), width),
                num_warps=1,
                enable_fp_fusion=False,
            )
    best, line = gains.max(1)
    return best, codes[torch.arange(rows, device=weights.device), line]


@triton.jit
def _neighbour(wanted, upper, BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lattice point below or above."""
    step = lattice_step(tl.where(wanted == 0, 1.0, tl.abs(wanted)), BITS, MIN_EXPONENT)
    steps = tl.floor(wanted / step) if upper == 0 else tl.ceil(wanted / step)
    return steps * step


@triton.jit
def _walk_offsets(  # type: ignore[no-untyped-def]
    weights,
    metric,
    linear,
    column_sums,
    scales,
    lines,
    offsets_out,
    codes_out,
    values_out,
    metric_sum,
    top,
    LOWEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    row = line // LINES
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    w = tl.load(weights + row * WIDTH + columns, mask=inside, other=0.0)
    b = tl.load(linear + row * WIDTH + columns, mask=inside, other=0.0)
    sums = tl.load(column_sums + columns, mask=inside, other=0.0)
    s = tl.load(scales + line)
    codes, place, speed = _start(w, columns, inside, -1, lines + 4 * line, top)
    gradient = matrix_vector(metric, codes, columns, inside, WIDTH)
    alpha, beta = tl.sum(codes * b, 0), tl.sum(codes * gradient, 0)
    ones, one_b, total = tl.sum(codes * sums, 0), tl.sum(b, 0), tl.load(metric_sum)
    lowest, largest = tl.full((), LOWEST, tl.float64), tl.full((), LARGEST, tl.float64)
    best, offset = tl.full((), float("inf"), tl.float64), tl.full((), 0.0, tl.float64)
    kept = tl.zeros_like(codes)
    settled, going = 1, 1
    time = tl.full((), 0.0, tl.float64)
    while going > 0:
        following, i = least_of(_next_crossings(codes, place, speed, top), columns)
        going = (following < float("inf")).to(tl.int32)
        if (settled > 0) | (following > time) | (going == 0):
            fixed, pull = s * (s * beta - 2 * alpha), one_b - s * ones
            wanted = tl.minimum(tl.maximum(pull / total, lowest), largest)
            for upper in tl.static_range(2):
                m = _neighbour(wanted, upper, BITS, MIN_EXPONENT)
                m = tl.minimum(tl.maximum(m, lowest), largest)
                value = fixed + m * (m * total - 2 * pull)
                if value < best:
                    best, offset, kept = value, m, codes
        if going > 0:
            here = columns == i
            alpha += tl.load(linear + row * WIDTH + i)
            beta += 2 * pick(gradient, here) + tl.load(metric + i * WIDTH + i)
            ones += tl.load(column_sums + i)
            gradient += tl.load(metric + i * WIDTH + columns, mask=inside, other=0.0)
            codes = tl.where(here, codes + 1, codes)
        settled, time = 0, following
    tl.store(values_out + line, best)
    tl.store(offsets_out + line, offset)
    tl.store(codes_out + line * WIDTH + columns, kept.to(tl.int32), mask=inside)


def affine_offsets(
    weights: Tensor,
    metric: Tensor,
    linear: Tensor,
    top: float,
    scales: Tensor,
    bits: int,
    min_exponent: int,
    lowest: float,
    largest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.affine_offsets`; all float64."""
    (rows, width), count = weights.shape, scales.shape[1]
    values, offsets = torch.empty_like(scales), torch.empty_like(scales)
    codes = torch.empty(rows, count, width, dtype=torch.int32, device=weights.device)
    u = torch.where(scales == 0, 0.0, 1 / torch.where(scales == 0, 1.0, scales))
    reach = torch.maximum(u * weights.amax(1, keepdim=True), u * weights.amin(1, keepdim=True))
    speed = (scales != 0).double()
    lines = torch.stack([u, -reach - 1, torch.zeros_like(u), speed], dim=2).contiguous()
    if rows and count:
        with on_device_of(weights):
            _walk_offsets[(rows * count,)](
                *(weights, metric, linear, metric.sum(1), scales, lines, offsets, codes, values),
                *(metric.sum(), top, lowest, largest, bits, min_exponent),
                *(count, block_of(width), width),
                num_warps=1,
                enable_fp_fusion=False,
            )
    best, n = values.min(1)
    every = torch.arange(rows, device=weights.device)
    return scales[every, n], offsets[every, n], codes[every, n], best
