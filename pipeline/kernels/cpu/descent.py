"""Coordinate descent for the CPU, compiled by Numba; rows run in parallel.

The contract is in `pipeline.kernels.descent`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from pipeline.kernels.cpu.common import lattice_step, nearest
from pipeline.kernels.twin.descent import LEAST_GAIN


@njit(cache=True, parallel=True)
def descend(indices, scales, offsets, residual, metric, levels, group_size):  # type: ignore[no-untyped-def]
    """See `pipeline.kernels.descend`."""
    rows, width = indices.shape
    found = indices.copy()
    delta = np.zeros_like(residual)
    midpoints = (levels[:-1] + levels[1:]) / levels.dtype.type(2)
    for r in prange(rows):
        gradient = residual[r].copy()
        for i in range(width):
            scale = scales[r, i // group_size]
            if scale == 0:
                continue
            offset = offsets[r, i // group_size]
            old = levels[found[r, i]]
            wanted = scale * old + offset + gradient[i] / metric[i, i]
            index = nearest((wanted - offset) / scale, midpoints)
            step = scale * (levels[index] - old)
            if step * (step * metric[i, i] - 2 * gradient[i]) < 0:
                found[r, i] = index
                delta[r, i] = step
                for j in range(width):
                    gradient[j] -= step * metric[i, j]
    return found, delta


@njit(cache=True)
def _best_level(i, current, alpha, beta, linear, product, metric, levels, signed):  # type: ignore[no-untyped-def]
    """Best level of one coordinate with the scale left free: (value, level)."""
    best, found = math.inf, current
    for k in range(len(levels)):
        d = levels[k] - levels[current]
        a = alpha + d * linear[i]
        b = beta + d * (2.0 * product[i] + d * metric[i, i])
        if b <= 0.0 or (not signed and a <= 0.0):
            continue
        value = -(a * a) / b
        if value < best:
            best, found = value, k
    return best, found


@njit(cache=True)
def _ascend(indices, linear, metric, levels, sweeps, signed):  # type: ignore[no-untyped-def]
    """Moves of one row until none helps; returns (alpha, beta)."""
    size = len(indices)
    product = np.zeros(size)
    for i in range(size):
        level = levels[indices[i]]
        if level != 0.0:
            for j in range(size):
                product[j] += level * metric[i, j]
    alpha = beta = 0.0
    for i in range(size):
        alpha += levels[indices[i]] * linear[i]
        beta += levels[indices[i]] * product[i]
    for _ in range(sweeps):
        moved = False
        for i in range(size):
            now = -(alpha * alpha) / beta if beta > 0.0 and (signed or alpha > 0.0) else 0.0
            value, level = _best_level(
                i, indices[i], alpha, beta, linear, product, metric, levels, signed
            )
            alone = linear[i] * linear[i] / metric[i, i]
            if not value < now - LEAST_GAIN * (abs(now) + alone):
                continue
            d = levels[level] - levels[indices[i]]
            alpha += d * linear[i]
            beta += d * (2.0 * product[i] + d * metric[i, i])
            for j in range(size):
                product[j] += d * metric[i, j]
            indices[i] = level
            moved = True
        if not moved:
            break
    return alpha, beta


@njit(cache=True, parallel=True)
def fit_free(indices, linear, metric, levels, sweeps, bits, min_exponent, largest, signed):  # type: ignore[no-untyped-def]
    """See `pipeline.kernels.fit_free`."""
    rows = len(indices)
    found = indices.copy()
    scales, objective = np.zeros(rows), np.zeros(rows)
    for r in prange(rows):
        alpha, beta = _ascend(found[r], linear[r], metric, levels, sweeps, signed)
        if beta <= 0.0 or alpha == 0.0 or (alpha < 0.0 and not signed):
            continue
        magnitude = abs(alpha / beta)
        step = lattice_step(magnitude, bits, min_exponent)
        for rounded in (math.floor(magnitude / step), math.ceil(magnitude / step)):
            candidate = math.copysign(min(rounded * step, largest), alpha)
            value = candidate * (beta * candidate - 2.0 * alpha)
            if value < objective[r]:
                objective[r], scales[r] = value, candidate
    return scales, found, objective
