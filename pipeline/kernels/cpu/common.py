"""What the compiled loops share: nearest levels and the steps of a scale lattice."""

from __future__ import annotations

import math

from numba import njit


@njit(cache=True, inline="always")
def nearest(value, midpoints):  # type: ignore[no-untyped-def]
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
def lattice_step(scale, bits, min_exponent):  # type: ignore[no-untyped-def]
    """Spacing of the lattice at a positive scale."""
    _, exponent = math.frexp(scale)
    return math.ldexp(1.0, max(exponent - bits, min_exponent))
