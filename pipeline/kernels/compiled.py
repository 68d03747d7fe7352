"""The hot loops for the CPU, compiled by Numba; rows run in parallel.

Contracts are documented in `pipeline.kernels`; `pipeline.kernels.twin` is the readable form.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange


@njit(cache=True, inline="always")
def _nearest(value, midpoints):  # type: ignore[no-untyped-def]
    """Index of the nearest level; a tie goes to the upper one."""
    low, high = 0, len(midpoints)
    while low < high:
        middle = (low + high) >> 1
        if value < midpoints[middle]:
            high = middle
        else:
            low = middle + 1
    return low


@njit(cache=True, inline="always")
def _lattice_step(scale, bits, min_exponent):  # type: ignore[no-untyped-def]
    _, exponent = math.frexp(scale)
    return math.ldexp(1.0, max(exponent - bits, min_exponent))


@njit(cache=True)
def _events(weights, midpoints, zero, positions, columns, steps, start):  # type: ignore[no-untyped-def]
    """Transition scales of one row for positive scales, and its codes in the limit of large scales.

    A weight crosses the midpoints of its own sign, the innermost first, at ``s = w / midpoint``.
    """
    count = 0
    for i in range(len(weights)):
        w = weights[i]
        start[i] = zero
        if w > 0.0:
            for k in range(len(midpoints)):
                if midpoints[k] > 0.0:
                    positions[count] = w / midpoints[k]
                    columns[count] = i
                    steps[count] = 1
                    count += 1
                elif midpoints[k] == 0.0:
                    start[i] = k + 1
        elif w < 0.0:
            for k in range(len(midpoints) - 1, -1, -1):
                if midpoints[k] < 0.0:
                    positions[count] = w / midpoints[k]
                    columns[count] = i
                    steps[count] = -1
                    count += 1
                elif midpoints[k] == 0.0:
                    start[i] = k
    return count


@njit(cache=True)
def _best_in_interval(alpha, beta, low, high, clamp, bits, min_exponent, largest, best):  # type: ignore[no-untyped-def]
    """Best lattice scale of one interval: (objective, scale); objective `best` if none beats it."""
    scale = alpha / beta
    if clamp:
        scale = min(max(scale, low), high)
    if not 0.0 < scale < math.inf:
        return best, 0.0
    if scale * (beta * scale - 2.0 * alpha) >= best:
        return best, 0.0
    found = 0.0
    step = _lattice_step(scale, bits, min_exponent)
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
def _sweep_row(weights, hessian, linear, levels, clamp, bits, min_exponent, largest, indices):  # type: ignore[no-untyped-def]
    """Best positive scale of one row. Writes its level indices; returns (objective, scale)."""
    size = len(weights)
    midpoints = 0.5 * (levels[:-1] + levels[1:])
    zero = _nearest(0.0, midpoints)
    capacity = size * len(midpoints)
    positions = np.empty(capacity)
    columns = np.empty(capacity, np.int64)
    steps = np.empty(capacity, np.int64)
    start = np.empty(size, np.int64)
    count = _events(weights, midpoints, zero, positions, columns, steps, start)
    order = np.argsort(-positions[:count])
    indices[:] = start
    gradient = np.zeros(size)  # H q
    alpha = 0.0
    for i in range(size):
        level = levels[start[i]]
        if level != 0.0:
            alpha += level * linear[i]
            for j in range(size):
                gradient[j] += level * hessian[i, j]
    beta = 0.0
    for i in range(size):
        beta += levels[start[i]] * gradient[i]
    best, best_scale, best_count = 0.0, 0.0, 0
    high, n = math.inf, 0
    while True:
        low = positions[order[n]] if n < count else 0.0
        if high > low and beta > 0.0:
            value, scale = _best_in_interval(
                alpha, beta, low, high, clamp, bits, min_exponent, largest, best
            )
            if scale > 0.0:
                best, best_scale, best_count = value, scale, n
        if n >= count:
            break
        high = low
        i = columns[order[n]]
        k = indices[i] + steps[order[n]]
        delta = levels[k] - levels[indices[i]]
        alpha += delta * linear[i]
        beta += delta * (2.0 * gradient[i] + delta * hessian[i, i])
        for j in range(size):
            gradient[j] += delta * hessian[i, j]
        indices[i] = k
        n += 1
    indices[:] = start
    for n in range(best_count):
        indices[columns[order[n]]] += steps[order[n]]
    return best, best_scale


@njit(cache=True, parallel=True)
def piso_sweep(weights, hessian, linear, levels, signed, clamp, bits, min_exponent, largest):  # type: ignore[no-untyped-def]
    """See `pipeline.kernels.piso_sweep`."""
    rows, size = weights.shape
    scales = np.zeros(rows)
    objective = np.zeros(rows)
    indices = np.zeros((rows, size), np.int64)
    mirrored = -levels[::-1].copy()
    for r in prange(rows):
        objective[r], scales[r] = _sweep_row(
            weights[r], hessian, linear[r], levels, clamp, bits, min_exponent, largest, indices[r]
        )
        if signed:
            other = np.empty(size, np.int64)
            value, scale = _sweep_row(
                weights[r], hessian, linear[r], mirrored, clamp, bits, min_exponent, largest, other
            )
            if value < objective[r]:
                objective[r] = value
                scales[r] = -scale
                for i in range(size):
                    indices[r, i] = len(levels) - 1 - other[i]
    return scales, indices, objective


@njit(cache=True, parallel=True)
def round_columns(weights, factor, scales, offsets, levels, group_size):  # type: ignore[no-untyped-def]
    """See `pipeline.kernels.round_columns`."""
    rows, width = weights.shape
    indices = np.empty((rows, width), np.int64)
    errors = np.empty_like(weights)
    midpoints = (levels[:-1] + levels[1:]) / levels.dtype.type(2)
    zero = _nearest(levels.dtype.type(0), midpoints)
    for r in prange(rows):
        row = weights[r].copy()
        for i in range(width):
            scale = scales[r, i // group_size]
            offset = offsets[r, i // group_size]
            index = zero if scale == 0 else _nearest((row[i] - offset) / scale, midpoints)
            error = (row[i] - (scale * levels[index] + offset)) / factor[i, i]
            indices[r, i] = index
            errors[r, i] = error
            for j in range(i + 1, width):
                row[j] -= error * factor[i, j]
    return indices, errors


@njit(cache=True)
def _affine_step(weights, hessian, linear, total, top, scale, offset, codes):  # type: ignore[no-untyped-def]
    """Round one row at (scale, offset) and refit both; returns them and the decrease they reach."""
    size = len(weights)
    for i in range(size):
        codes[i] = min(max(math.floor((weights[i] - offset) / scale + 0.5), 0.0), top)
    qq = qo = qb = ob = 0.0
    for i in range(size):
        product = 0.0
        for j in range(size):
            product += hessian[i, j] * codes[j]
        qq += codes[i] * product
        qo += product
        qb += codes[i] * linear[i]
        ob += linear[i]
    determinant = qq * total - qo * qo
    if determinant <= 1e-12 * qq * total:
        return 0.0, 0.0, -math.inf
    fitted = (qb * total - ob * qo) / determinant
    shift = (ob * qq - qb * qo) / determinant
    return fitted, shift, fitted * qb + shift * ob


@njit(cache=True, parallel=True)
def fit_affine(weights, hessian, levels, starts, iterations):  # type: ignore[no-untyped-def]
    """See `pipeline.kernels.fit_affine`."""
    rows, size = weights.shape
    top = float(levels - 1)
    total = hessian.sum()
    scales, offsets = np.zeros(rows), np.zeros(rows)
    kept = np.zeros((rows, size), np.int64)
    objective = np.full(rows, math.inf)
    for r in prange(rows):
        row = weights[r]
        low, high = row.min(), row.max()
        offsets[r] = low
        if high == low:
            objective[r] = 0.0
            continue
        codes = np.empty(size)
        fitted_codes = np.empty(size)
        linear = np.zeros(size)
        for i in range(size):
            for j in range(size):
                linear[j] += row[i] * hessian[i, j]
        energy = 0.0
        for i in range(size):
            energy += row[i] * linear[i]
        for n in range(len(starts)):
            scale = starts[n, 0] * (high - low) / top
            offset = low + (1.0 - starts[n, 0]) * (high - low) * starts[n, 1]
            reached = -math.inf
            for _ in range(iterations):
                fitted, shift, decrease = _affine_step(
                    row, hessian, linear, total, top, scale, offset, codes
                )
                if fitted <= 0.0 or decrease <= reached:
                    break
                scale, offset, reached = fitted, shift, decrease
                fitted_codes[:] = codes
            if energy - reached < objective[r]:
                scales[r], offsets[r], objective[r] = scale, offset, energy - reached
                for i in range(size):
                    kept[r, i] = int(fitted_codes[i])
    return scales, offsets, kept, objective
