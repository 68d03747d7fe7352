"""Sub-scales of one group for the CPU, compiled by Numba; rows run in parallel.

The contract is in `pipeline.kernels.sub_scales`.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from pipeline.kernels.cpu.common import nearest
from pipeline.kernels.twin.descent import LEAST_GAIN


@njit(cache=True)
def _energy(scale, offset, indices, levels, metric, linear, values):  # type: ignore[no-untyped-def]
    """``v'Mv - 2 v'c``; leaves v in `values`."""
    size = len(indices)
    for i in range(size):
        values[i] = scale * levels[indices[i]] + offset
    total = 0.0
    for i in range(size):
        product = 0.0
        for j in range(size):
            product += metric[i, j] * values[j]
        total += values[i] * (product - 2.0 * linear[i])
    return total


@njit(cache=True)
def _round(weights, scale, offset, midpoints, indices):  # type: ignore[no-untyped-def]
    for i in range(len(weights)):
        ratio = 0.0 if scale == 0.0 else (weights[i] - offset) / scale
        indices[i] = nearest(ratio, midpoints)


@njit(cache=True)
def _descend(scale, offset, indices, levels, midpoints, metric, linear, gradient):  # type: ignore[no-untyped-def]
    """One pass of coordinate descent on the codes."""
    size = len(indices)
    if scale == 0.0:
        return
    for i in range(size):
        gradient[i] = linear[i]
    for j in range(size):
        value = scale * levels[indices[j]] + offset
        for i in range(size):
            gradient[i] -= value * metric[j, i]
    for i in range(size):
        old = levels[indices[i]]
        found = nearest(old + gradient[i] / metric[i, i] / scale, midpoints)
        step = scale * (levels[found] - old)
        if step * (step * metric[i, i] - 2.0 * gradient[i]) < 0.0:
            indices[i] = found
            for j in range(size):
                gradient[j] -= step * metric[i, j]


@njit(cache=True)
def _best_pair(indices, mn, d, dmin, levels, metric, linear, limits):  # type: ignore[no-untyped-def]
    """The best of all pairs for fixed codes."""
    size = len(indices)
    qq = q1 = qc = one_c = total = 0.0
    for i in range(size):
        product = row = 0.0
        for j in range(size):
            product += metric[i, j] * levels[indices[j]]
            row += metric[i, j]
        level = levels[indices[i]]
        qq += level * product
        q1 += product
        qc += level * linear[i]
        one_c += linear[i]
        total += row
    best, found_sc, found_mn = np.inf, 0, mn
    for sc in range(limits[0], limits[1] + 1):
        s = d * sc
        m = float(mn)
        if dmin != 0.0:
            m = np.round((s * q1 - one_c) / total / dmin)
            m = min(max(m, float(limits[2])), float(limits[3]))
        o = -dmin * m
        value = s * (s * qq + 2.0 * o * q1 - 2.0 * qc) + o * (o * total - 2.0 * one_c)
        if value < best:
            best, found_sc, found_mn = value, sc, int(m)
    return found_sc, found_mn


@njit(cache=True)
def _polish(sc, mn, indices, energy, d, dmin, levels, midpoints, metric, linear, limits, sweeps):  # type: ignore[no-untyped-def]
    """Alternate codes and pair; `indices` is changed in place. Returns (sc, mn, energy)."""
    size = len(indices)
    work, tried = np.empty(size), indices.copy()
    for _ in range(sweeps):
        before = energy
        tried[:] = indices
        _descend(d * sc, -dmin * mn, tried, levels, midpoints, metric, linear, work)
        found = _energy(d * sc, -dmin * mn, tried, levels, metric, linear, work)
        if found < energy - LEAST_GAIN * abs(energy):
            energy = found
            indices[:] = tried
        s, m = _best_pair(indices, mn, d, dmin, levels, metric, linear, limits)
        found = _energy(d * s, -dmin * m, indices, levels, metric, linear, work)
        if found < energy - LEAST_GAIN * abs(energy):
            energy, sc, mn = found, s, m
        if not energy < before:
            break
    return sc, mn, energy


@njit(cache=True)
def _search(weights, sc, mn, d, dmin, levels, midpoints, metric, linear, limits, reach, best_codes):  # type: ignore[no-untyped-def]
    """All pairs around the start under round to nearest. Returns (sc, mn, energy)."""
    size = len(weights)
    work, tried = np.empty(size), np.empty(size, np.int64)
    best, found_sc, found_mn = np.inf, sc, mn
    sideways = reach if limits[3] > limits[2] else 0
    for ds in range(-reach, reach + 1):
        s = min(max(sc + ds, limits[0]), limits[1])
        for dm in range(-sideways, sideways + 1):
            m = min(max(mn + dm, limits[2]), limits[3])
            _round(weights, d * s, -dmin * m, midpoints, tried)
            energy = _energy(d * s, -dmin * m, tried, levels, metric, linear, work)
            if best == np.inf or energy < best - LEAST_GAIN * abs(best):
                best, found_sc, found_mn = energy, s, m
                best_codes[:] = tried
    return found_sc, found_mn, best


@njit(cache=True, parallel=True)
def fit_sub_scales(  # type: ignore[no-untyped-def]
    weights, metric, linear, d, dmin, sc, mn, indices, given, levels, limits, reach, sweeps
):
    """See `pipeline.kernels.fit_sub_scales`."""
    rows, size = weights.shape
    out_sc, out_mn = sc.copy(), mn.copy()
    codes, objective = indices.copy(), np.zeros(rows)
    midpoints = (levels[:-1] + levels[1:]) / 2.0
    for r in prange(rows):
        fixed = (d[r], dmin[r], levels, midpoints, metric, linear[r], limits)
        found = np.empty(size, np.int64)
        s, m, energy = _search(weights[r], sc[r], mn[r], *fixed, reach, found)
        s, m, energy = _polish(s, m, found, energy, *fixed, sweeps)
        if given:
            old, work = indices[r].copy(), np.empty(size)
            start = _energy(d[r] * sc[r], -dmin[r] * mn[r], old, levels, metric, linear[r], work)
            s0, m0, e0 = _polish(sc[r], mn[r], old, start, *fixed, sweeps)
            if not energy < e0 - LEAST_GAIN * abs(e0):
                s, m, energy = s0, m0, e0
                found[:] = old
        out_sc[r], out_mn[r], objective[r] = s, m, energy
        codes[r] = found
    return out_sc, out_mn, codes, objective
