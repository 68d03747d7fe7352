"""Affine codes along lines for the CPU, compiled by Numba; rows run in parallel.

The contracts are in `pipeline.kernels.affine`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from pipeline.kernels.cpu.common import lattice_step


@njit(cache=True)
def _crossings(weights, line, anchor, top, codes, times, columns, steps):  # type: ignore[no-untyped-def]
    """Codes just after the start of a line, and every later change of one code by one.

    Writes `codes` and the first entries of the other buffers; returns how many.
    """
    count = 0
    for i in range(len(weights)):
        place = line[0] * weights[i] + line[1] + 0.5
        speed = line[2] * weights[i] + line[3]
        code = math.floor(place)
        # On a threshold the direction decides; parallel to it, the order of the columns does.
        if code == place and (speed < 0.0 or (speed == 0.0 and 0 <= anchor < i)):
            code -= 1.0
        code = min(max(code, 0.0), top)
        codes[i] = code
        if speed > 0.0:
            level = code + 1.0
            while level <= top:
                times[count], columns[count], steps[count] = (level - place) / speed, i, 1.0
                level += 1.0
                count += 1
        elif speed < 0.0:
            level = code
            while level >= 1.0:
                times[count], columns[count], steps[count] = (level - place) / speed, i, -1.0
                level -= 1.0
                count += 1
    return count


@njit(cache=True, inline="always")
def _settled(n, order, times):  # type: ignore[no-untyped-def]
    """Whether the next crossing does not coincide with the last one."""
    return n == 0 or n == len(order) or times[order[n]] > times[order[n - 1]]


@njit(cache=True)
def _walk(metric, linear, anchor, least, codes, crossings, best, kept):  # type: ignore[no-untyped-def]
    """Best ``alpha^2 / beta`` on one line; returns the larger of it and `best`, codes in `kept`."""
    size = len(codes)
    order, times, columns, steps = crossings
    gradient = np.zeros(size)
    alpha = 0.0
    for i in range(size):
        alpha += codes[i] * linear[i]
        for j in range(size):
            gradient[j] += codes[i] * metric[i, j]
    beta = 0.0
    for i in range(size):
        beta += codes[i] * gradient[i]
    for n in range(len(order) + 1):
        settled = _settled(n, order, times)
        if settled and beta > least and alpha > 0.0 and alpha * alpha > best * beta:
            best = alpha * alpha / beta
            kept[:] = codes
        if settled and anchor >= 0:
            a = alpha - linear[anchor]
            b = beta - 2.0 * gradient[anchor] + metric[anchor, anchor]
            if b > least and a > 0.0 and a * a > best * b:
                best = a * a / b
                kept[:] = codes
                kept[anchor] -= 1.0
        if n == len(order):
            break
        i, step = columns[order[n]], steps[order[n]]
        alpha += step * linear[i]
        beta += step * 2.0 * gradient[i] + metric[i, i]
        for j in range(size):
            gradient[j] += step * metric[i, j]
        codes[i] += step
    return best


@njit(cache=True, parallel=True)
def affine_lines(weights, metric, linear, top, lines, anchors, least):  # type: ignore[no-untyped-def]
    """See `pipeline.kernels.affine_lines`."""
    rows, size = weights.shape
    gains = np.zeros(rows)
    found = np.zeros((rows, size))
    for r in prange(rows):
        codes = np.empty(size)
        times = np.empty(size * int(top))
        columns = np.empty(size * int(top), np.int64)
        steps = np.empty(size * int(top))
        for n in range(lines.shape[1]):
            anchor = anchors[r, n]
            count = _crossings(weights[r], lines[r, n], anchor, top, codes, times, columns, steps)
            crossings = (np.argsort(times[:count]), times, columns, steps)
            gains[r] = _walk(metric, linear[r], anchor, least, codes, crossings, gains[r], found[r])
    return gains, found


@njit(cache=True)
def _best_offset(wanted, bits, min_exponent, lowest, largest):  # type: ignore[no-untyped-def]
    """Nearest lattice point in the range, which is best on a parabola in m."""
    wanted = min(max(wanted, lowest), largest)
    step = lattice_step(abs(wanted), bits, min_exponent)
    below = max(math.floor(wanted / step) * step, lowest)
    above = min(math.ceil(wanted / step) * step, largest)
    return below if wanted - below <= above - wanted else above


@njit(cache=True)
def _offset_walk(  # type: ignore[no-untyped-def]
    metric, column, total, linear, b_sum, scale, limits, codes, crossings, best, kept
):
    """Best lattice offset at one scale: (objective, offset); `best` if nothing beats it."""
    size = len(codes)
    gradient = np.zeros(size)
    qb = qo = qq = 0.0
    for i in range(size):
        qb += codes[i] * linear[i]
        qo += codes[i] * column[i]
        for j in range(size):
            gradient[j] += codes[i] * metric[i, j]
    for i in range(size):
        qq += codes[i] * gradient[i]
    bits, min_exponent, lowest, largest = limits
    order, times, columns, steps = crossings
    found = 0.0
    for n in range(len(order) + 1):
        fixed = scale * (scale * qq - 2.0 * qb)
        pull = b_sum - scale * qo
        if _settled(n, order, times) and fixed - pull * pull / total < best:
            m = _best_offset(pull / total, bits, min_exponent, lowest, largest)
            value = fixed + m * (m * total - 2.0 * pull)
            if value < best:
                best, found = value, m
                kept[:] = codes
        if n == len(order):
            break
        i, step = columns[order[n]], steps[order[n]]
        qb += step * linear[i]
        qo += step * column[i]
        qq += step * 2.0 * gradient[i] + metric[i, i]
        for j in range(size):
            gradient[j] += step * metric[i, j]
        codes[i] += step
    return best, found


@njit(cache=True, parallel=True)
def affine_offsets(weights, metric, linear, top, scales, bits, min_exponent, lowest, largest):  # type: ignore[no-untyped-def]
    """See `pipeline.kernels.affine_offsets`."""
    rows, size = weights.shape
    objective = np.full(rows, math.inf)
    chosen, offsets = np.zeros(rows), np.zeros(rows)
    found = np.zeros((rows, size))
    column = metric.sum(axis=1)
    total = column.sum()
    limits = (bits, min_exponent, lowest, largest)
    for r in prange(rows):
        row = weights[r]
        codes = np.zeros(size)
        times = np.empty(size * int(top))
        columns = np.empty(size * int(top), np.int64)
        steps = np.empty(size * int(top))
        for n in range(scales.shape[1]):
            scale = scales[r, n]
            codes[:] = 0.0
            count = 0
            if scale != 0.0:
                u = 1.0 / scale
                line = np.array([u, -max(u * row.max(), u * row.min()) - 1.0, 0.0, 1.0])
                count = _crossings(row, line, -1, top, codes, times, columns, steps)
            crossings = (np.argsort(times[:count]), times, columns, steps)
            value, offset = _offset_walk(
                metric, column, total, linear[r], linear[r].sum(), scale, limits,
                codes, crossings, objective[r], found[r],
            )  # fmt: skip
            if value < objective[r]:
                objective[r], chosen[r], offsets[r] = value, scale, offset
    return chosen, offsets, found, objective
