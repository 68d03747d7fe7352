"""The diagonal PiSO sweep for the CPU, compiled by Numba; rows run in parallel.

The contract is in `pipeline.kernels.diagonal`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from pipeline.kernels.cpu.common import nearest
from pipeline.kernels.cpu.events import transitions
from pipeline.kernels.cpu.sweep import best_in_interval


@njit(cache=True)
def _sweep_row(  # type: ignore[no-untyped-def]
    weights, diagonal, linear, levels, clamp, bits, min_exponent, largest, best, indices
):
    """Best positive scale of one row among those with an objective below `best`.

    Writes its level indices; returns (objective, scale), scale 0 if there is none.
    """
    size = len(weights)
    midpoints = 0.5 * (levels[:-1] + levels[1:])
    capacity = size * len(midpoints)
    positions = np.empty(capacity)
    columns = np.empty(capacity, np.int64)
    steps = np.empty(capacity, np.int64)
    start = np.empty(size, np.int64)
    zero = nearest(0.0, midpoints)
    count = transitions(weights, midpoints, zero, positions, columns, steps, start)
    indices[:] = start
    alpha, beta = 0.0, 0.0
    for i in range(size):
        level = levels[start[i]]
        alpha += level * linear[i]
        beta += level * level * diagonal[i]
    best_scale, best_count = 0.0, 0
    high = math.inf
    for n in range(count + 1):
        low = positions[n] if n < count else 0.0
        if high > low and beta > 0.0:
            value, scale = best_in_interval(
                alpha, beta, low, high, clamp, bits, min_exponent, largest, best
            )
            if scale > 0.0:
                best, best_scale, best_count = value, scale, n
        if n < count:
            high = low
            i = columns[n]
            before = levels[indices[i]]
            indices[i] += steps[n]
            after = levels[indices[i]]
            alpha += (after - before) * linear[i]
            beta += (after * after - before * before) * diagonal[i]
    indices[:] = start
    for n in range(best_count):
        indices[columns[n]] += steps[n]
    return best, best_scale


@njit(cache=True, parallel=True)
def piso_sweep_diagonal(  # type: ignore[no-untyped-def]
    weights, diagonal, linear, levels, signed, clamp, bits, min_exponent, largest
):
    """See `pipeline.kernels.piso_sweep_diagonal`; the diagonal is [1 or rows, inputs]."""
    rows, size = weights.shape
    scales = np.zeros(rows)
    objective = np.zeros(rows)
    indices = np.zeros((rows, size), np.int64)
    mirrored = -levels[::-1].copy()
    for r in prange(rows):
        w, h, b = weights[r], diagonal[min(np.int64(r), len(diagonal) - 1)], linear[r]
        objective[r], scales[r] = _sweep_row(
            w, h, b, levels, clamp, bits, min_exponent, largest, 0.0, indices[r]
        )
        if signed:
            other = np.empty(size, np.int64)
            value, scale = _sweep_row(
                w, h, b, mirrored, clamp, bits, min_exponent, largest, objective[r], other
            )
            if scale > 0.0:
                objective[r] = value
                scales[r] = -scale
                for i in range(size):
                    indices[r, i] = len(levels) - 1 - other[i]
    return scales, indices, objective
