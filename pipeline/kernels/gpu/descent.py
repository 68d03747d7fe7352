"""Coordinate descent in Triton. The contract is in `pipeline.kernels.descent`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.gpu.common import (
    block_of,
    divide,
    largest_of,
    lattice_step,
    load_midpoints,
    nearest,
    on_device_of,
    pick,
)
from pipeline.kernels.twin.descent import LEAST_GAIN


@triton.jit
def _descend_row(  # type: ignore[no-untyped-def]
    indices,
    scales,
    offsets,
    residual,
    metric,
    levels,
    found,
    delta,
    count,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scales += row * (WIDTH // GROUP)
    offsets += row * (WIDTH // GROUP)
    gradient = tl.load(residual + row * WIDTH + columns, mask=inside, other=0.0)
    index = tl.load(indices + row * WIDTH + columns, mask=inside, other=0).to(tl.int32)
    midpoints = load_midpoints(levels, count, LEVELS)
    change = tl.zeros_like(gradient)
    for i in range(WIDTH):
        here = columns == i
        scale = tl.load(scales + i // GROUP)
        offset = tl.load(offsets + i // GROUP)
        old = tl.load(levels + tl.sum(tl.where(here, index, 0), 0))
        pull = pick(gradient, here)
        diagonal = tl.load(metric + i * WIDTH + i)
        wanted = scale * old + offset + divide(pull, diagonal)
        new = nearest(divide(wanted - offset, tl.where(scale == 0, 1.0, scale)), midpoints)
        step = scale * (tl.load(levels + new) - old)
        if step * (step * diagonal - 2 * pull) < 0:
            gradient -= step * tl.load(metric + i * WIDTH + columns, mask=inside, other=0.0)
            index = tl.where(here, new, index)
            change = tl.where(here, step, change)
    tl.store(found + row * WIDTH + columns, index.to(tl.int64), mask=inside)
    tl.store(delta + row * WIDTH + columns, change, mask=inside)


def descend(
    indices: Tensor,
    scales: Tensor,
    offsets: Tensor,
    residual: Tensor,
    metric: Tensor,
    levels: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """See `pipeline.kernels.descend`; all but `indices` of one dtype, all contiguous."""
    rows, width = indices.shape
    found, delta = torch.empty_like(indices), torch.empty_like(residual)
    if rows:
        with on_device_of(residual):
            _descend_row[(rows,)](
                *(indices, scales, offsets, residual, metric, levels, found, delta),
                *(len(levels), block_of(len(levels)), block_of(width), width, group_size),
                num_warps=1,
                enable_fp_fusion=False,
            )
    return found, delta


@triton.jit
def _store_on_lattice(  # type: ignore[no-untyped-def]
    alpha,
    beta,
    scale_out,
    objective_out,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Store the better lattice neighbour of the vertex ``alpha / beta``, or 0 if neither helps."""
    vertex = tl.where(beta > 0, alpha / tl.where(beta > 0, beta, 1.0), 0.0)
    if not SIGNED:
        vertex = tl.where(vertex > 0, vertex, 0.0)
    sign = tl.where(vertex < 0, -1.0, 1.0).to(tl.float64)
    magnitude = tl.abs(vertex)
    step = lattice_step(tl.where(magnitude > 0, magnitude, 1.0), BITS, MIN_EXPONENT)
    limit = tl.full((), LARGEST, tl.float64)
    best, scale = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    for upper in tl.static_range(2):
        steps = tl.floor(magnitude / step) if upper == 0 else tl.ceil(magnitude / step)
        candidate = sign * tl.minimum(steps * step, limit)
        value = candidate * (beta * candidate - 2 * alpha)
        better = value < best
        best, scale = tl.where(better, value, best), tl.where(better, candidate, scale)
    tl.store(scale_out, scale)
    tl.store(objective_out, best)


@triton.jit
def _fit_row(  # type: ignore[no-untyped-def]
    indices,
    linear,
    metric,
    levels,
    scales,
    found,
    objective,
    count,
    sweeps,
    GAIN: tl.constexpr,
    SIGNED: tl.constexpr,
    BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    k = tl.arange(0, LEVELS)
    grid = tl.load(levels + k, mask=k < count, other=0.0)
    index = tl.load(indices + row * WIDTH + columns, mask=inside, other=0).to(tl.int32)
    codes = tl.load(levels + index, mask=inside, other=0.0)
    c = tl.load(linear + row * WIDTH + columns, mask=inside, other=0.0)
    product = tl.zeros_like(codes)
    for j in range(WIDTH):
        line = tl.load(metric + j * WIDTH + columns, mask=inside, other=0.0)
        product += pick(codes, columns == j) * line
    alpha, beta = tl.sum(codes * c, 0), tl.sum(codes * product, 0)
    sweep, moves = 0, 1
    while (sweep < sweeps) & (moves > 0):
        moves = 0
        for i in range(WIDTH):
            here = columns == i
            old = tl.sum(tl.where(here, index, 0), 0)
            d = grid - tl.load(levels + old)
            twice = 2 * pick(product, here)
            diagonal = tl.load(metric + i * WIDTH + i)
            own = tl.load(linear + row * WIDTH + i)
            a = alpha + d * own
            b = beta + d * (twice + d * diagonal)
            usable = (k < count) & (b > 0) & (SIGNED | (a > 0))
            gain, new = largest_of(tl.where(usable, a * a / tl.where(b > 0, b, 1.0), 0.0), k)
            helps = (beta > 0) & (SIGNED | (alpha > 0))
            now = tl.where(helps, alpha * alpha / tl.where(beta > 0, beta, 1.0), 0.0)
            if gain > now + GAIN * (now + own * own / diagonal):
                step = tl.load(levels + new) - tl.load(levels + old)
                alpha += step * own
                beta += step * (twice + step * diagonal)
                product += step * tl.load(metric + i * WIDTH + columns, mask=inside, other=0.0)
                index = tl.where(here, new, index)
                moves = 1
        sweep += 1
    tl.store(found + row * WIDTH + columns, index.to(tl.int64), mask=inside)
    _store_on_lattice(
        alpha, beta, scales + row, objective + row, SIGNED, BITS, MIN_EXPONENT, LARGEST
    )


def fit_free(
    indices: Tensor,
    linear: Tensor,
    metric: Tensor,
    levels: Tensor,
    sweeps: int,
    bits: int,
    min_exponent: int,
    largest: float,
    signed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.fit_free`; all but `indices` float64, all contiguous."""
    rows, width = indices.shape
    scales, objective = linear.new_empty(rows), linear.new_empty(rows)
    found = torch.empty_like(indices)
    if rows:
        with on_device_of(linear):
            _fit_row[(rows,)](
                *(indices, linear, metric, levels, scales, found, objective),
                *(len(levels), sweeps, LEAST_GAIN, signed, bits, min_exponent, largest),
                *(block_of(len(levels)), block_of(width), width),
                num_warps=1,
                enable_fp_fusion=False,
            )
    return scales, found, objective
