"""The loss of sequential rounding for the CPU, compiled by Numba; rows run in parallel.

The contract is in `pipeline.kernels.lookahead`.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from pipeline.kernels.cpu.common import nearest

COUNTED_LEVELS = 32
"""Most levels whose midpoints are compared one by one, which vectorises over candidates."""


@njit(cache=True)
def _nearest_of_all(ratios, midpoints, found):  # type: ignore[no-untyped-def]
    """`nearest` of every ratio."""
    if len(midpoints) < COUNTED_LEVELS:
        found[:] = 0
        for k in range(len(midpoints)):
            middle = midpoints[k]
            for n in range(len(ratios)):
                found[n] += ratios[n] >= middle
    else:
        for n in range(len(ratios)):
            found[n] = nearest(ratios[n], midpoints)


@njit(cache=True, parallel=True)
def sequential_loss(weights, factor, scales, offsets, levels):  # type: ignore[no-untyped-def]
    """See `pipeline.kernels.sequential_loss`."""
    rows, width = weights.shape
    count = scales.shape[1]
    loss = np.zeros((rows, count))
    midpoints = 0.5 * (levels[:-1] + levels[1:])
    for r in prange(rows):
        # Candidates are the innermost axis, so that every loop over them is one of SIMD.
        work = np.empty((width, count))
        for i in range(width):
            work[i] = weights[r, i]
        ratios, errors = np.empty(count), np.empty(count)
        found = np.empty(count, np.int64)
        for i in range(width):
            row = work[i]
            for n in range(count):
                divisor = scales[r, n] if scales[r, n] != 0.0 else 1.0
                ratios[n] = (row[n] - offsets[r, n]) / divisor
            _nearest_of_all(ratios, midpoints, found)
            for n in range(count):
                value = scales[r, n] * levels[found[n]] + offsets[r, n]
                errors[n] = (row[n] - value) / factor[i, i]
                loss[r, n] += errors[n] * errors[n]
            for j in range(i + 1, width):
                share = factor[i, j]
                later = work[j]
                for n in range(count):
                    later[n] -= errors[n] * share
    return loss
