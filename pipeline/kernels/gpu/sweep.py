"""The PiSO sweep in Triton. The contract is in `pipeline.kernels.sweep`.

Groups: the events of a coordinate are sorted already, so one program merges the lists of its row
and updates ``H q`` at every event. Wide rows: `pipeline.kernels.gpu.wide_sweep`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.gpu.common import (
    best_in_interval,
    block_of,
    largest_of,
    load_midpoints,
    on_device_of,
    pick,
)
from pipeline.kernels.gpu.wide_sweep import sweep_wide

WIDEST_GROUP = 256
"""Up to this width the row of H that an event adds comes from the caches."""

CHECK_EVERY = 16
"""Events between two tests of the pruning bound."""


@triton.jit
def _next_transition(weight, index, levels, count):  # type: ignore[no-untyped-def]
    """Scale at which a weight next leaves its level as the scale falls; 0 if it never does."""
    other = index + tl.where(weight > 0, 1, -1)
    exists = (weight != 0) & (other >= 0) & (other < count)
    here = tl.load(levels + index, mask=exists, other=1.0)
    there = tl.load(levels + other, mask=exists, other=1.0)
    return tl.where(exists, weight / (0.5 * (here + there)), 0.0)


@triton.jit
def _coefficients(codes, hessian, linear, columns, inside, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """``H q`` and the two sums of the objective for the codes in the limit of large scales."""
    gradient = codes * 0.0
    if tl.max((codes != 0).to(tl.int32), 0) > 0:
        for j in range(WIDTH):
            row = tl.load(hessian + j * WIDTH + columns, mask=inside, other=0.0)
            gradient += pick(codes, columns == j) * row
    return gradient, tl.sum(codes * linear, 0), tl.sum(codes * gradient, 0)


@triton.jit
def _innermost(weights, mirror, levels, count, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Level indices in the limit of large scales, and the index of the level nearest to zero."""
    midpoints = load_midpoints(levels, count, LEVELS)
    above = tl.sum((midpoints <= 0).to(tl.int32), 0)
    below = tl.sum((midpoints < 0).to(tl.int32), 0)
    down = (weights < 0) | ((weights == 0) & (mirror == 1))
    return tl.where(down, below, above), above


@triton.jit
def _slopes(weights, linear, levels, codes, count):  # type: ignore[no-untyped-def]
    """Largest ``q_i b_i`` that each weight reaches on its side of zero, at least 0."""
    highest, lowest = tl.load(levels + count - 1), tl.load(levels)
    outer = tl.where(weights > 0, highest, tl.where(weights < 0, lowest, codes))
    return tl.maximum(tl.maximum(codes * linear, outer * linear), 0.0)


@triton.jit
def _radius(levels, count, zero, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest distance, at scale 1, between a weight that is not clipped and its level."""
    k = tl.arange(0, LEVELS)
    inner = k + 1 < count
    gaps = tl.load(levels + k + 1, mask=inner, other=0.0) - tl.load(levels + k, inner, other=0.0)
    return tl.maximum(0.5 * tl.max(gaps, 0), tl.abs(tl.load(levels + zero)))


@triton.jit
def _hopeless(weights, linear, slopes, radius, scale, ceiling, best):  # type: ignore[no-untyped-def]
    """Whether no scale up to `scale` gets below `best`; proof in `pipeline.kernels.sweep`."""
    nearby = tl.abs(linear) * (tl.abs(weights) + scale * radius)
    reach = tl.sum(tl.minimum(scale * slopes, nearby), 0) * (1 + 1e-9)
    bound = reach * (reach / ceiling - 2)
    return (reach < ceiling) & (bound >= best * (1 - 1e-9))


@triton.jit
def _commit(  # type: ignore[no-untyped-def]
    i, sign, weights, hessian, linear, levels, count, state, columns, inside, WIDTH: tl.constexpr
):
    """Moves coordinate i by one level; the state is alpha, beta, ``H q``, indices, next events."""
    alpha, beta, gradient, index, position = state
    moved = columns == i
    weight = sign * tl.load(weights + i)
    old = tl.sum(tl.where(moved, index, 0), 0)
    new = old + tl.where(weight > 0, 1, -1)
    delta = tl.load(levels + new) - tl.load(levels + old)
    row = tl.load(hessian + i * WIDTH + columns, mask=inside, other=0.0)
    alpha += delta * (sign * tl.load(linear + i))
    diagonal = tl.load(hessian + i * WIDTH + i)
    beta += delta * (2 * pick(gradient, moved) + delta * diagonal)
    gradient += delta * row
    index = tl.where(moved, new, index)
    position = tl.where(moved, _next_transition(weight, new, levels, count), position)
    return alpha, beta, gradient, index, position


@triton.jit
def _evaluate(  # type: ignore[no-untyped-def]
    alpha,
    beta,
    low,
    high,
    best,
    CLAMP: tl.constexpr,
    BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Objective and scale of one interval; (0, 0) where it cannot beat the best so far."""
    value, scale = best * 0.0, best * 0.0
    # The unclamped parabola bounds the interval from below; most intervals end here.
    if (alpha > 0) & (high > low) & (alpha * alpha >= -best * beta * (1 - 1e-9)):
        value, scale = best_in_interval(alpha, beta, low, high, CLAMP, BITS, MIN_EXPONENT, LARGEST)
    return value, scale


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    weights,
    hessian,
    linear,
    levels,
    ceilings,
    scales,
    indices,
    objective,
    count,
    CHECK: tl.constexpr,
    CLAMP: tl.constexpr,
    BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row and one sign of the scale; a negative scale is a positive one of the negated row."""
    mirror = tl.program_id(1)
    sign = tl.where(mirror == 1, -1.0, 1.0).to(tl.float64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weights += tl.program_id(0).to(tl.int64) * WIDTH
    linear += tl.program_id(0).to(tl.int64) * WIDTH
    w = sign * tl.load(weights + columns, mask=inside, other=0.0)
    b = sign * tl.load(linear + columns, mask=inside, other=0.0)
    index, above = _innermost(w, mirror, levels, count, LEVELS)
    codes = tl.load(levels + index, mask=inside, other=0.0)
    gradient, alpha, beta = _coefficients(codes, hessian, b, columns, inside, WIDTH)
    position = _next_transition(w, index, levels, count)
    ceiling = tl.load(ceilings + tl.program_id(0))
    slopes, radius = _slopes(w, b, levels, codes, count), _radius(levels, count, above, LEVELS)
    high, events = tl.full((), float("inf"), tl.float64), 0
    best, best_scale = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    best_index = index
    while high > 0:
        low, i = largest_of(position, columns)
        value, scale = _evaluate(alpha, beta, low, high, best, CLAMP, BITS, MIN_EXPONENT, LARGEST)
        better = value < best
        best_index = tl.where(better, index, best_index)
        best_scale, best = tl.where(better, scale, best_scale), tl.where(better, value, best)
        high = low
        if events % CHECK == 0:
            high = tl.where(_hopeless(w, b, slopes, radius, low, ceiling, best), 0.0, low)
        events += 1
        if high > 0:
            state = (alpha, beta, gradient, index, position)
            alpha, beta, gradient, index, position = _commit(
                i, sign, weights, hessian, linear, levels, count, state, columns, inside, WIDTH
            )
    out = mirror.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scales + out, sign * best_scale)
    tl.store(objective + out, best)
    tl.store(indices + out * WIDTH + columns, best_index.to(tl.int64), mask=inside)


def piso_sweep(
    weights: Tensor,
    hessian: Tensor,
    linear: Tensor,
    levels: Tensor,
    signed: bool,
    clamp: bool,
    bits: int,
    min_exponent: int,
    largest: float,
    ceiling: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.piso_sweep`; all tensors float64 and contiguous.

    Args:
        ceiling: Upper bounds of ``b' H^-1 b``, [rows]; None or a negative one never prunes.
    """
    limits = (clamp, bits, min_exponent, largest)
    rows, width = weights.shape
    if width > WIDEST_GROUP:
        signs = (False, True) if signed else (False,)
        found = [
            sweep_wide(weights, hessian, linear, levels, sign, *limits, ceiling) for sign in signs
        ]
        return _better(*(torch.stack(part) for part in zip(*found, strict=True)))
    signs_shape = (2 if signed else 1, rows)
    scales, objective = weights.new_empty(signs_shape), weights.new_empty(signs_shape)
    indices = torch.empty((*signs_shape, width), dtype=torch.int64, device=weights.device)
    tops = torch.full_like(weights[:, 0], -1) if ceiling is None else ceiling
    if rows:
        with on_device_of(weights):
            _merge[(rows, signs_shape[0])](
                *(weights, hessian, linear, levels, tops),
                *(scales, indices, objective, len(levels), CHECK_EVERY),
                *(*limits, block_of(len(levels)), block_of(width), width),
                num_warps=1,
                enable_fp_fusion=False,
            )
    return _better(scales, indices, objective)


def _better(scales: Tensor, indices: Tensor, objective: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The better sign of every row, the positive one if they are equal."""
    if len(scales) == 1:
        return scales[0], indices[0], objective[0]
    negative = objective[1] < objective[0]
    return (
        torch.where(negative, scales[1], scales[0]),
        torch.where(negative[:, None], indices[1], indices[0]),
        torch.where(negative, objective[1], objective[0]),
    )
