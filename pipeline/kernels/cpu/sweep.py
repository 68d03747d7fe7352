"""The PiSO sweep for the CPU, compiled by Numba; rows run in parallel.

The contract is in `pipeline.kernels.sweep`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from pipeline.kernels.cpu.common import lattice_step, nearest
from pipeline.kernels.cpu.events import MERGED_LISTS, merge, open_lists, sort_events

CHECK_EVERY = 16
"""Events between two tests of the pruning bound, which costs as much as one event."""


@njit(cache=True)
def best_in_interval(alpha, beta, low, high, clamp, bits, min_exponent, largest, best):  # type: ignore[no-untyped-def]
    """Best lattice scale of one interval: (objective, scale); objective `best` if none beats it."""
    scale = alpha / beta
    if clamp:
        scale = min(max(scale, low), high)
    scale = min(scale, largest)
    if not 0.0 < scale < math.inf:
        return best, 0.0
    if scale * (beta * scale - 2.0 * alpha) >= best:
        return best, 0.0
    found = 0.0
    step = lattice_step(scale, bits, min_exponent)
    for candidate in (math.floor(scale / step) * step, math.ceil(scale / step) * step):
        if candidate <= 0.0 or candidate > largest:
            continue
        if clamp and (candidate < low or candidate > high):
            continue
        objective = candidate * (beta * candidate - 2.0 * alpha)
        if objective < best:
            best = objective
            found = candidate
    return best, found


@njit(cache=True)
def _limits(weights, linear, levels, start, radius):  # type: ignore[no-untyped-def]
    """What ``q_i b_i`` can reach, [3, inputs]: the terms of the bound in `_hopeless`.

    The largest value on the weight's side of zero, at least 0; ``|w_i b_i|``; ``radius |b_i|``.
    """
    limits = np.empty((3, len(weights)))
    for i in range(len(weights)):
        first = last = levels[start[i]]
        if weights[i] > 0.0:
            last = levels[-1]
        elif weights[i] < 0.0:
            last = levels[0]
        limits[0, i] = max(0.0, first * linear[i], last * linear[i])
        limits[1, i] = abs(weights[i] * linear[i])
        limits[2, i] = radius * abs(linear[i])
    return limits


@njit(cache=True, fastmath={"reassoc"})
def _reach(limits, scale):  # type: ignore[no-untyped-def]
    """Upper bound of ``v'b`` for scales up to `scale`, but for the order of its sum."""
    reach = 0.0
    for i in range(limits.shape[1]):
        reach += min(scale * limits[0, i], limits[1, i] + scale * limits[2, i])
    return reach


@njit(cache=True)
def _hopeless(limits, scale, ceiling, best):  # type: ignore[no-untyped-def]
    """Whether no scale up to `scale` can lower the objective below `best`."""
    reach = _reach(limits, scale) * (1.0 + 1e-9)
    return reach < ceiling and reach * (reach / ceiling - 2.0) >= best * (1.0 - 1e-9)


@njit(cache=True)
def _coefficients(levels, indices, hessian, linear, gradient):  # type: ignore[no-untyped-def]
    """alpha = q'b and beta = q'Hq of some codes; adds H q to `gradient`."""
    size = len(linear)
    alpha = 0.0
    for i in range(size):
        level = levels[indices[i]]
        if level != 0.0:
            alpha += level * linear[i]
            for j in range(size):
                gradient[j] += level * hessian[i, j]
    beta = 0.0
    for i in range(size):
        beta += levels[indices[i]] * gradient[i]
    return alpha, beta


@njit(cache=True)
def _sweep_row(  # type: ignore[no-untyped-def]
    weights, hessian, linear, levels, clamp, bits, min_exponent, largest, ceiling, best, indices
):
    """Best positive scale of one row among those with an objective below `best`.

    Writes its level indices; returns (objective, scale, events walked), scale 0 if there is none.
    """
    size = len(weights)
    midpoints = 0.5 * (levels[:-1] + levels[1:])
    zero = nearest(0.0, midpoints)
    capacity = size * len(midpoints)
    positions = np.empty(capacity)
    columns = np.empty(capacity, np.int64)
    steps = np.empty(capacity, np.int64)
    start = np.empty(size, np.int64)
    lists, count = open_lists(weights, midpoints, zero, start), 0
    merging = len(midpoints) <= MERGED_LISTS  # as far as the sweep gets
    if not merging:
        count = sort_events(lists, positions, columns, steps)
    radius = max(0.5 * np.max(levels[1:] - levels[:-1]), abs(levels[zero]))
    limits = _limits(weights, linear, levels, start, radius)
    indices[:] = start
    gradient = np.zeros(size)  # H q
    alpha, beta = _coefficients(levels, start, hessian, linear, gradient)
    best_scale, best_count = 0.0, 0
    high, n = math.inf, 0
    while True:
        if merging and n == count:
            wanted = min(count + CHECK_EVERY, capacity)
            count = merge(lists, positions, columns, steps, count, wanted)
        low = positions[n] if n < count else 0.0
        # The unclamped parabola bounds the interval from below; most intervals end here.
        promising = alpha > 0.0 and alpha * alpha >= -best * beta * (1.0 - 1e-9)
        if promising and high > low and beta > 0.0:
            value, scale = best_in_interval(
                alpha, beta, low, high, clamp, bits, min_exponent, largest, best
            )
            if scale > 0.0:
                best, best_scale, best_count = value, scale, n
        if n >= count:
            break
        high = low
        if n % CHECK_EVERY == 0 and _hopeless(limits, high, ceiling, best):
            break
        i = columns[n]
        k = indices[i] + steps[n]
        delta = levels[k] - levels[indices[i]]
        alpha += delta * linear[i]
        beta += delta * (2.0 * gradient[i] + delta * hessian[i, i])
        for j in range(size):
            gradient[j] += delta * hessian[i, j]
        indices[i] = k
        n += 1
    indices[:] = start
    for e in range(best_count):
        indices[columns[e]] += steps[e]
    return best, best_scale, n


@njit(cache=True, parallel=True)
def piso_sweep(  # type: ignore[no-untyped-def]
    weights, hessian, linear, levels, signed, clamp, bits, min_exponent, largest, ceiling
):
    """See `pipeline.kernels.piso_sweep`; the fourth output counts the events walked, [rows].

    Args:
        ceiling: Upper bounds of ``b' H^-1 b``, [rows]; a negative one switches pruning off.
    """
    rows, size = weights.shape
    scales = np.zeros(rows)
    objective = np.zeros(rows)
    walked = np.zeros(rows, np.int64)
    indices = np.zeros((rows, size), np.int64)
    mirrored = -levels[::-1].copy()
    for r in prange(rows):
        w, b, top = weights[r], linear[r], ceiling[r]
        objective[r], scales[r], walked[r] = _sweep_row(
            w, hessian, b, levels, clamp, bits, min_exponent, largest, top, 0.0, indices[r]
        )
        if signed:
            other = np.empty(size, np.int64)
            value, scale, more = _sweep_row(
                w,
                hessian,
                b,
                mirrored,
                clamp,
                bits,
                min_exponent,
                largest,
                top,
                objective[r],
                other,
            )
            walked[r] += more
            if scale > 0.0:
                objective[r] = value
                scales[r] = -scale
                for i in range(size):
                    indices[r, i] = len(levels) - 1 - other[i]
    return scales, indices, objective, walked
