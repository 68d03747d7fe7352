"""Rounding to a codebook for the CPU, compiled by Numba; rows run in parallel.

The contract is in `pipeline.kernels.vectors`. The nearest entry is found by depth-first search
through the codebook's prefix tree, nearest level first (Schnorr and Euchner's order): with an upper
triangular root of the metric each place adds a square to the loss, so that a prefix that costs as
much as the best entry so far ends its branch.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from pipeline.kernels.twin.vectors import ANY, LEAST_GAIN

_LONGEST = 8
_PARTIAL, _DIFFERENCE, _CENTRE = 0, 1, 2  # rows of a search's work space: floats, then integers
_NODE, _NEGATIVE, _LOW, _HIGH, _CODE = 0, 1, 2, 3, 4


@njit(cache=True)
def _space():  # type: ignore[no-untyped-def]
    """Work space of the searches of one row."""
    return np.empty((3, _LONGEST + 1)), np.empty((5, _LONGEST + 1), np.int64)


@njit(cache=True)
def _enter(depth, target, pull, root, at, levels, space):  # type: ignore[no-untyped-def]
    """Where the next place would cost nothing, and the levels to its two sides."""
    real, whole = space
    lean = pull[depth]
    for i in range(depth):
        lean += real[_DIFFERENCE, i] * root[at + i, at + depth]
    centre = target[depth] + lean / root[at + depth, at + depth]
    high = 0
    while high < len(levels) and levels[high] <= centre:
        high += 1
    real[_CENTRE, depth] = centre
    whole[_LOW, depth] = high - 1
    whole[_HIGH, depth] = high


@njit(cache=True)
def _next(depth, levels, space):  # type: ignore[no-untyped-def]
    """The nearest level that was not tried yet, or -1."""
    real, whole = space
    low, high = whole[_LOW, depth], whole[_HIGH, depth]
    centre = real[_CENTRE, depth]
    if high < len(levels) and (low < 0 or levels[high] - centre < centre - levels[low]):
        whole[_HIGH, depth] = high + 1
        return high
    whole[_LOW, depth] = low - 1
    return low


@njit(cache=True)
def _search(target, pull, root, at, parity, book, bound, found, space):  # type: ignore[no-untyped-def]
    """The entry of least ``|(t - q) R + p|^2``, if it is below `bound`; returns its loss."""
    children, levels, places, _, _ = book
    real, whole = space
    half = len(levels) // 2
    depth = 0
    real[_PARTIAL, 0] = 0.0
    whole[_NODE, 0] = whole[_NEGATIVE, 0] = 0
    _enter(0, target, pull, root, at, levels, space)
    while depth >= 0:
        code = _next(depth, levels, space)
        cost = math.inf
        if code >= 0:
            error = (real[_CENTRE, depth] - levels[code]) * root[at + depth, at + depth]
            cost = real[_PARTIAL, depth] + error * error
        if not cost < bound:  # those that are left are farther still
            depth -= 1
            continue
        node = children[whole[_NODE, depth], code - half if code >= half else half - 1 - code]
        negative = whole[_NEGATIVE, depth] + (code < half)
        last = depth == places - 1
        if node < 0 or (last and parity >= 0 and negative % 2 != parity):
            continue
        whole[_CODE, depth] = code
        if last:
            bound = cost
            for i in range(places):
                found[i] = whole[_CODE, i]
            depth -= 1
            continue
        real[_DIFFERENCE, depth] = target[depth] - levels[code]
        depth += 1
        real[_PARTIAL, depth] = cost
        whole[_NODE, depth], whole[_NEGATIVE, depth] = node, negative
        _enter(depth, target, pull, root, at, levels, space)
    return bound


@njit(cache=True)
def _unit(target, pull, root, at, book, bound, found, space):  # type: ignore[no-untyped-def]
    """An entry, or two under each parity that they can share; returns the loss as `_search`."""
    _, levels, places, unit, even = book
    if places == unit:
        parity = 0 if even else ANY
        return _search(target, pull, root, at, parity, book, bound, found, space)
    tried = np.empty(unit, np.int64)
    lean = np.empty(places)
    for parity in range(2):
        cost = _search(target, pull, root, at, parity, book, bound, tried, space)
        if not cost < bound:
            continue
        for j in range(places):
            lean[j] = pull[places + j]
            for i in range(places):
                step = target[i] - levels[tried[i]]
                lean[j] += step * root[at + i, at + places + j]
        left = bound - cost
        second = tried[places:]
        more = _search(target[places:], lean, root, at + places, parity, book, left, second, space)
        if more < left:
            bound = cost + more
            found[:unit] = tried
    return bound


@njit(cache=True)
def _round(x, root, scale, book, bound, codes, space):  # type: ignore[no-untyped-def]
    """Units one after the other, errors fed back; returns the loss, infinite if not below bound."""
    _, levels, _, unit, _ = book
    size = len(x)
    square = scale * scale
    loss = 0.0
    difference, pull, target = np.empty(size), np.zeros(unit), np.zeros(unit)
    for at in range(0, size, unit):
        if scale != 0.0:
            for j in range(unit):
                pull[j] = 0.0
                for i in range(at):
                    pull[j] += difference[i] * root[i, at + j]
                pull[j] /= scale
                target[j] = x[at + j] / scale
        left = (bound - loss) / square if scale != 0.0 else math.inf
        found = codes[at : at + unit]
        cost = _unit(target, pull, root, at, book, left, found, space)
        if not cost < left:
            return math.inf
        for j in range(unit):
            difference[at + j] = x[at + j] - scale * levels[found[j]]
        loss += square * cost
    if scale == 0.0:
        for j in range(size):
            error = 0.0
            for i in range(j + 1):
                error += x[i] * root[i, j]
            loss += error * error
    return loss


@njit(cache=True)
def _improve(at, own, inverse, parity, scale, book, state, space):  # type: ignore[no-untyped-def]
    """Best entry (unit without a parity) at one place with all others held; whether it changed."""
    codes, difference, gradient, metric = state
    levels = book[1]
    length = len(own)
    target, pull = np.empty(length), np.zeros(length)
    better = np.empty(length, np.int64)
    now = 0.0
    for j in range(length):
        shift = 0.0
        for i in range(length):
            shift += gradient[at + i] * inverse[i, j]
        now += shift * gradient[at + j]
        target[j] = levels[codes[at + j]] + shift / scale
    bound = now * (1.0 - LEAST_GAIN) / (scale * scale)
    if parity == ANY:
        cost = _unit(target, pull, own, 0, book, bound, better, space)
    else:
        cost = _search(target, pull, own, 0, parity, book, bound, better, space)
    if not cost < bound:
        return False
    for i in range(length):
        step = scale * (levels[better[i]] - levels[codes[at + i]])
        codes[at + i] = better[i]
        difference[at + i] -= step
        for j in range(len(gradient)):
            gradient[j] -= step * metric[at + i, j]
    return True


@njit(cache=True)
def _polish(x, metric, blocks, scale, book, sweeps, codes, space):  # type: ignore[no-untyped-def]
    """Descent over units, and over the halves of a unit of two entries; returns the loss."""
    own, inverse, half_own, half_inverse = blocks
    _, levels, places, unit, _ = book
    size = len(x)
    difference, gradient = np.empty(size), np.zeros(size)
    for i in range(size):
        difference[i] = x[i] - scale * levels[codes[i]]
        for j in range(size):
            gradient[j] += difference[i] * metric[i, j]
    state = (codes, difference, gradient, metric)
    for _ in range(sweeps if scale != 0.0 else 0):
        moved = False
        for b in range(size // unit):
            at = b * unit
            moved |= _improve(at, own[b], inverse[b], ANY, scale, book, state, space)
            for h in range(
                b * len(half_own) * unit // size, (b + 1) * len(half_own) * unit // size
            ):
                at = h * places
                parity = 0
                for i in range(places):
                    parity ^= codes[at + i] < len(levels) // 2
                moved |= _improve(
                    at, half_own[h], half_inverse[h], parity, scale, book, state, space
                )
        if not moved:
            break
    loss = 0.0
    for j in range(size):
        loss += difference[j] * gradient[j]
    return loss


@njit(cache=True, parallel=True)
def fit_vectors(weights, metric, root, blocks, scales, first, codes_given, given, book, sweeps):  # type: ignore[no-untyped-def]  # fmt: skip
    """See `pipeline.kernels.fit_vectors`."""
    rows, size = weights.shape
    count = scales.shape[1]
    found = np.zeros((rows, size), np.int64)
    chosen = np.empty(rows, np.int64)
    losses = np.empty(rows)
    for r in prange(rows):
        space = _space()
        x, codes = weights[r], np.zeros(size, np.int64)
        best, place = math.inf, -1
        if given:
            found[r] = codes_given[r]
            best = _polish(x, metric, blocks, first[r], book, sweeps, found[r], space)
            place = count
        for k in range(count):
            loss = _round(x, root, scales[r, k], book, best, codes, space)
            if loss < best:
                best, place = loss, k
                found[r] = codes
        if 0 <= place < count:
            scale = scales[r, place]
            best = _polish(x, metric, blocks, scale, book, sweeps, found[r], space)
        chosen[r] = place
        losses[r] = best
    return chosen, found, losses
