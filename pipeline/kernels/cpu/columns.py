"""Sequential rounding for the CPU, compiled by Numba; rows run in parallel.

The contract is in `pipeline.kernels.columns`.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from pipeline.kernels.cpu.common import nearest


@njit(cache=True, parallel=True)
def round_columns(weights, factor, scales, offsets, levels, group_size, drift):  # type: ignore[no-untyped-def]
    """See `pipeline.kernels.round_columns`."""
    rows, width = weights.shape
    indices = np.empty((rows, width), np.int64)
    errors = np.empty_like(weights)
    midpoints = (levels[:-1] + levels[1:]) / levels.dtype.type(2)
    zero = nearest(levels.dtype.type(0), midpoints)
    for r in prange(rows):
        row = weights[r].copy()
        for i in range(width):
            scale = scales[r, i // group_size]
            offset = offsets[r, i // group_size]
            index = zero if scale == 0 else nearest((row[i] - offset) / scale, midpoints)
            error = (row[i] - (scale * levels[index] + offset)) / factor[i, i]
            indices[r, i] = index
            errors[r, i] = error
            for j in range(i + 1, width):
                row[j] -= error * factor[i, j]
            # Numba drops this branch from the form that is compiled for None.
            if drift is not None:
                for j in range(i + 1, width):
                    row[j] += row[i] * drift[i, j]
    return indices, errors
