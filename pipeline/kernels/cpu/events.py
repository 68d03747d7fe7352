"""Transition scales of one row in descending order, as far as somebody asks for them.

A weight crosses the midpoints of its own sign, the innermost first, at ``s = w / midpoint``. With
the weights in order of size, the events of one midpoint are in order too, and a merge of those
lists gives all events without sorting them.
"""

from __future__ import annotations

import numpy as np
from numba import njit

MERGED_LISTS = 40
"""Up to so many midpoints their sorted lists are merged; a sort of all events is faster beyond."""

OCTAVES = 8
"""Sizes below the largest one by more powers of two than this share one bucket."""

CROWDED = 64
"""Members from which a bucket is sorted by comparisons, as insertion would take their square."""


@njit(cache=True)
def order_by_size(weights):  # type: ignore[no-untyped-def]
    """Columns in descending order of absolute value, int64 [inputs].

    Buckets are taken from the leading bits of the float64 numbers, several for each weight in every
    octave; insertion settles the order inside them.
    """
    size = len(weights)
    sizes = np.abs(weights)
    bits = sizes.view(np.int64)
    fraction = 5
    while (4 << fraction) < size:
        fraction += 1
    shift, buckets = 52 - fraction, OCTAVES << fraction
    top = bits.max() >> shift if size else 0
    ends = np.zeros(buckets + 1, np.int64)
    bucket = np.empty(size, np.int64)
    for i in range(size):
        bucket[i] = min(top - (bits[i] >> shift), buckets - 1)
        ends[bucket[i] + 1] += 1
    for k in range(1, buckets + 1):
        if ends[k] > CROWDED:
            return np.argsort(-sizes)
        ends[k] += ends[k - 1]
    order = np.empty(size, np.int64)
    for i in range(size):
        order[ends[bucket[i]]] = i
        ends[bucket[i]] += 1
    for place in range(1, size):
        column, n = order[place], place
        while n > 0 and bits[order[n - 1]] < bits[column]:
            order[n] = order[n - 1]
            n -= 1
        order[n] = column
    return order


@njit(cache=True)
def open_lists(weights, midpoints, zero, start):  # type: ignore[no-untyped-def]
    """Lists of the events of every midpoint, none taken yet.

    Writes the codes in the limit of large scales to `start`.

    Returns:
        Columns of the weights above and below zero, the largest first, [2, inputs]; their sizes in
        the same places, followed by a 0, [2, inputs + 1]; of each midpoint, its size, its side, the
        number of its events that were taken and the position of the next one, or 0.
    """
    size = len(weights)
    for i in range(size):
        start[i] = zero
        for k in range(len(midpoints)):
            if midpoints[k] == 0.0 and weights[i] != 0.0:
                start[i] = k + 1 if weights[i] > 0.0 else k
    columns, sizes = np.empty((2, size), np.int64), np.zeros((2, size + 1))
    ends = np.zeros(2, np.int64)
    for i in order_by_size(weights):
        if weights[i] != 0.0:
            side = 0 if weights[i] > 0.0 else 1
            columns[side, ends[side]] = i
            sizes[side, ends[side]] = abs(weights[i])
            ends[side] += 1
    lists = np.count_nonzero(midpoints)
    marks, sides = np.empty(lists), np.empty(lists, np.int64)
    taken, heads = np.zeros(lists, np.int64), np.empty(lists)
    n = 0
    for midpoint in midpoints:
        if midpoint != 0.0:
            marks[n], sides[n] = abs(midpoint), 0 if midpoint > 0.0 else 1
            heads[n] = sizes[sides[n], 0] / marks[n]
            n += 1
    return columns, sizes, marks, sides, taken, heads


@njit(cache=True)
def merge(lists, positions, columns, steps, count, wanted):  # type: ignore[no-untyped-def]
    """Appends events to `count` others: positions, columns and index steps.

    Returns their number: `wanted`, or less if there are no more.
    """
    ordered, sizes, marks, sides, taken, heads = lists
    while count < wanted:
        largest, k = 0.0, -1
        for other in range(len(heads)):
            if heads[other] > largest:
                largest, k = heads[other], other
        if k < 0:
            break
        side, n = sides[k], taken[k]
        positions[count] = largest
        columns[count] = ordered[side, n]
        steps[count] = 1 - 2 * side
        count += 1
        taken[k] = n + 1
        heads[k] = sizes[side, n + 1] / marks[k]
    return count


@njit(cache=True)
def sort_events(lists, positions, columns, steps):  # type: ignore[no-untyped-def]
    """Writes all events, sorted; returns their number."""
    ordered, sizes, marks, sides, _, _ = lists
    capacity = len(positions)
    where = np.empty(capacity)
    which, sign = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    count = 0
    for k in range(len(marks)):
        side, n = sides[k], 0
        while sizes[side, n] > 0.0:
            where[count] = sizes[side, n] / marks[k]
            which[count] = ordered[side, n]
            sign[count] = 1 - 2 * side
            count += 1
            n += 1
    order = np.argsort(-where[:count])
    for n in range(count):
        positions[n], columns[n], steps[n] = where[order[n]], which[order[n]], sign[order[n]]
    return count


@njit(cache=True)
def transitions(weights, midpoints, zero, positions, columns, steps, start):  # type: ignore[no-untyped-def]
    """All events of one row, and its codes in the limit of large scales.

    Writes positions in descending order, with their columns and index steps; returns their number.
    """
    lists = open_lists(weights, midpoints, zero, start)
    if len(midpoints) > MERGED_LISTS:
        return sort_events(lists, positions, columns, steps)
    return merge(lists, positions, columns, steps, 0, len(positions))
