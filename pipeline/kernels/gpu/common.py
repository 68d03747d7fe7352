"""What the Triton kernels share: selection of one value, nearest levels, a scale's lattice."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_BLOCK = 32
"""A whole warp: its reductions of 32-bit integers are single instructions."""


def block_of(width: int) -> int:
    """Vector length of a program that holds `width` values: a power of two, at least a warp."""
    return max(MIN_BLOCK, triton.next_power_of_2(width))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def pick(values, chosen):  # type: ignore[no-untyped-def]
    """The one value of a vector that `chosen` marks.

    float64 goes through its two halves, because sums of integers over a warp are single
    instructions and sums of doubles are not.
    """
    if values.dtype == tl.float64:
        bits = tl.where(chosen, values.to(tl.int64, bitcast=True), 0)
        upper = tl.sum((bits >> 32).to(tl.int32), 0).to(tl.int64)
        lower = tl.sum(bits.to(tl.int32), 0).to(tl.int64)
        picked = ((upper << 32) | (lower & 0xFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        picked = tl.sum(tl.where(chosen, values, 0.0), 0)
    return picked


@triton.jit
def matrix_vector(matrix, vector, columns, inside, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Symmetric matrix times a vector that is 0 outside, line by line from the cache."""
    product = tl.zeros_like(vector)
    for j in range(WIDTH):
        line = tl.load(matrix + j * WIDTH + columns, mask=inside, other=0.0)
        product += pick(vector, columns == j) * line
    return product


@triton.jit
def largest_of(values, places):  # type: ignore[no-untyped-def]
    """Largest of a vector of doubles, none negative, and the lowest place where it stands.

    Such doubles are ordered like their bits; the halves are compared one after the other, as
    32-bit integers.
    """
    bits = values.to(tl.int64, bitcast=True)
    upper = (bits >> 32).to(tl.int32)
    lower = ((bits & 0xFFFFFFFF) - 0x80000000).to(tl.int32)
    top = tl.max(upper, 0)
    rest = tl.max(tl.where(upper == top, lower, -0x80000000), 0)
    found = (top.to(tl.int64) << 32) + (rest.to(tl.int64) + 0x80000000)
    place = tl.min(tl.where(bits == found, places, 0x7FFFFFFF), 0)
    return found.to(tl.float64, bitcast=True), place


@triton.jit
def least_of(values, places):  # type: ignore[no-untyped-def]
    """Smallest of a vector of doubles, none negative, and the lowest place where it stands."""
    bits = values.to(tl.int64, bitcast=True)
    upper = (bits >> 32).to(tl.int32)
    lower = ((bits & 0xFFFFFFFF) - 0x80000000).to(tl.int32)
    top = tl.min(upper, 0)
    rest = tl.min(tl.where(upper == top, lower, 0x7FFFFFFF), 0)
    found = (top.to(tl.int64) << 32) + (rest.to(tl.int64) + 0x80000000)
    place = tl.min(tl.where(bits == found, places, 0x7FFFFFFF), 0)
    return found.to(tl.float64, bitcast=True), place


@triton.jit
def divide(a, b):  # type: ignore[no-untyped-def]
    """Correctly rounded division; `/` is that for float64 only."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def load_midpoints(levels, count, LEVELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Midpoints between `count` levels, [LEVELS], padded with infinity."""
    k = tl.arange(0, LEVELS)
    low = tl.load(levels + k, mask=k < count, other=0.0)
    high = tl.load(levels + k + 1, mask=k + 1 < count, other=float("inf"))
    return 0.5 * (low + high)


@triton.jit
def nearest(value, midpoints):  # type: ignore[no-untyped-def]
    """Index of the nearest level; a tie goes to the upper one."""
    return tl.sum((midpoints <= value).to(tl.int32), 0)


@triton.jit
def power_of_two(exponent):  # type: ignore[no-untyped-def]
    """``2^exponent`` as float64 for -1074 <= exponent <= 1023."""
    normal = (exponent + 1023).to(tl.int64) << 52
    shift = tl.minimum(tl.maximum(exponent + 1074, 0), 51).to(tl.int64)
    subnormal = tl.full((), 1, tl.int64) << shift
    return tl.where(exponent >= -1022, normal, subnormal).to(tl.float64, bitcast=True)


@triton.jit
def lattice_step(scale, BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Distance of the lattice points around a positive float64 scale."""
    small = scale < 2.2250738585072014e-308
    normal = tl.where(small, scale * 18014398509481984.0, scale)
    biased = (normal.to(tl.int64, bitcast=True) >> 52).to(tl.int32)
    exponent = biased - 1022 - tl.where(small, 54, 0)
    return power_of_two(tl.maximum(exponent - BITS, MIN_EXPONENT))


@triton.jit
def best_in_interval(  # type: ignore[no-untyped-def]
    alpha,
    beta,
    low,
    high,
    CLAMP: tl.constexpr,
    BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Least ``s^2 beta - 2 s alpha`` on the lattice in an interval, and s; (0, 0) if none < 0."""
    vertex = alpha / tl.where(beta > 0, beta, 1.0)
    if CLAMP:
        vertex = tl.minimum(tl.maximum(vertex, low), high)
    vertex = tl.minimum(vertex, tl.full((), LARGEST, tl.float64))
    usable = (beta > 0) & (high > low) & (vertex > 0) & (vertex < float("inf"))
    vertex = tl.where(usable, vertex, 1.0)
    step = lattice_step(vertex, BITS, MIN_EXPONENT)
    objective, scale = vertex * 0.0, vertex * 0.0
    for upper in tl.static_range(2):
        steps = tl.floor(vertex / step) if upper == 0 else tl.ceil(vertex / step)
        candidate = steps * step
        better = usable & (candidate > 0) & (candidate <= LARGEST)
        if CLAMP:
            better = better & (candidate >= low) & (candidate <= high)
        value = candidate * (beta * candidate - 2 * alpha)
        better = better & (value < objective)
        objective = tl.where(better, value, objective)
        scale = tl.where(better, candidate, scale)
    return objective, scale
