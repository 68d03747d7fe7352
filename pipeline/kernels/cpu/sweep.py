"""The PiSO sweep for the CPU, compiled by Numba; rows run in parallel.

The contract is in `pipeline.kernels.sweep`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from pipeline.kernels.cpu.common import lattice_step, nearest

CHECK_EVERY = 16
"""Events between two tests of the pruning bound, which costs as much as one event."""


MERGED_LISTS = 40
"""Up to so many midpoints their sorted lists are merged; a sort of all events is faster beyond."""


@njit(cache=True)
def transitions(weights, midpoints, zero, positions, columns, steps, start):  # type: ignore[no-untyped-def]
    """Transition scales of one row for positive scales, and its codes in the limit of large scales.

    A weight crosses the midpoints of its own sign, the innermost first, at ``s = w / midpoint``.
    Writes positions in descending order, with their columns and index steps; returns their number.
    """
    lists = _open_lists(weights, midpoints, zero, start)
    if len(midpoints) > MERGED_LISTS:
        return _sorted(weights, midpoints, lists, positions, columns, steps)
    return _merge(weights, midpoints, lists, positions, columns, steps, 0, len(positions))


@njit(cache=True)
def _by_size(weights, midpoints, zero, start):  # type: ignore[no-untyped-def]
    """Weights above and below zero, [2, inputs], the largest first, and their numbers, [2].

    Writes the codes in the limit of large scales to `start`.
    """
    size = len(weights)
    for i in range(size):
        start[i] = zero
        for k in range(len(midpoints)):
            if midpoints[k] == 0.0 and weights[i] != 0.0:
                start[i] = k + 1 if weights[i] > 0.0 else k
    sizes = np.argsort(-np.abs(weights))
    ends = np.zeros(2, np.int64)
    sides = np.empty((2, size), np.int64)
    for i in sizes:
        if weights[i] != 0.0:
            side = 0 if weights[i] > 0.0 else 1
            sides[side, ends[side]] = i
            ends[side] += 1
    return sides, ends


@njit(cache=True)
def _open_lists(weights, midpoints, zero, start):  # type: ignore[no-untyped-def]
    """Events of every midpoint in descending order, none taken yet.

    Returns what `_by_size` does, and of each midpoint the number of events that were taken and the
    position of the next, or 0.
    """
    sides, ends = _by_size(weights, midpoints, zero, start)
    lists = len(midpoints)
    taken, heads = np.zeros(lists, np.int64), np.zeros(lists)
    for k in range(lists):
        side = 0 if midpoints[k] > 0.0 else 1
        if midpoints[k] != 0.0 and ends[side] > 0:
            heads[k] = weights[sides[side, 0]] / midpoints[k]
    return sides, ends, taken, heads


@njit(cache=True)
def _merge(weights, midpoints, lists, positions, columns, steps, count, wanted):  # type: ignore[no-untyped-def]
    """Appends events, which the order of weights has sorted within each list, to `count` others.

    Returns their number: `wanted`, or less if there are no more.
    """
    sides, ends, taken, heads = lists
    while count < wanted:
        largest, k = 0.0, -1
        for other in range(len(heads)):
            if heads[other] > largest:
                largest, k = heads[other], other
        if k < 0:
            break
        side = 0 if midpoints[k] > 0.0 else 1
        positions[count] = largest
        columns[count] = sides[side, taken[k]]
        steps[count] = 1 - 2 * side
        count += 1
        taken[k] += 1
        heads[k] = weights[sides[side, taken[k]]] / midpoints[k] if taken[k] < ends[side] else 0.0
    return count


@njit(cache=True)
def _sorted(weights, midpoints, lists, positions, columns, steps):  # type: ignore[no-untyped-def]
    """Sorts the events of all midpoints."""
    sides, ends, _, _ = lists
    capacity = len(positions)
    where = np.empty(capacity)
    which, sign = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    count = 0
    for k in range(len(midpoints)):
        side = 0 if midpoints[k] > 0.0 else 1
        if midpoints[k] == 0.0:
            continue
        for n in range(ends[side]):
            where[count] = weights[sides[side, n]] / midpoints[k]
            which[count] = sides[side, n]
            sign[count] = 1 - 2 * side
            count += 1
    order = np.argsort(-where[:count])
    for n in range(count):
        positions[n], columns[n], steps[n] = where[order[n]], which[order[n]], sign[order[n]]
    return count


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
def _slopes(weights, linear, levels, start, slopes):  # type: ignore[no-untyped-def]
    """Largest ``q_i b_i`` that a weight reaches on its side of zero, at least 0."""
    for i in range(len(weights)):
        first = last = levels[start[i]]
        if weights[i] > 0.0:
            last = levels[-1]
        elif weights[i] < 0.0:
            last = levels[0]
        slopes[i] = max(0.0, first * linear[i], last * linear[i])


@njit(cache=True)
def _hopeless(weights, linear, slopes, radius, scale, ceiling, best):  # type: ignore[no-untyped-def]
    """Whether no scale up to `scale` can lower the objective below `best`."""
    reach = 0.0
    for i in range(len(weights)):
        nearby = abs(linear[i]) * (abs(weights[i]) + scale * radius)
        reach += min(scale * slopes[i], nearby)
    reach *= 1.0 + 1e-9
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
    lists, count = _open_lists(weights, midpoints, zero, start), 0
    merging = len(midpoints) <= MERGED_LISTS  # as far as the sweep gets
    if not merging:
        count = _sorted(weights, midpoints, lists, positions, columns, steps)
    slopes = np.empty(size)
    _slopes(weights, linear, levels, start, slopes)
    radius = max(0.5 * np.max(levels[1:] - levels[:-1]), abs(levels[zero]))
    indices[:] = start
    gradient = np.zeros(size)  # H q
    alpha, beta = _coefficients(levels, start, hessian, linear, gradient)
    best_scale, best_count = 0.0, 0
    high, n = math.inf, 0
    while True:
        if merging and n == count:
            wanted = min(count + CHECK_EVERY, capacity)
            count = _merge(weights, midpoints, lists, positions, columns, steps, count, wanted)
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
        if n % CHECK_EVERY == 0 and _hopeless(weights, linear, slopes, radius, high, ceiling, best):
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
