"""Hadamard matrices of any order that Sylvester's and Paley's constructions reach, from no table.

A Hadamard matrix has entries of 1 and -1 and orthogonal rows. Products of orders are orders
(Sylvester, Kronecker); a finite field of q elements gives order ``q + 1`` if q = 3 mod 4 and
``2 (q + 1)`` if q = 1 mod 4 (Paley 1933, constructions I and II). Where the width of a model leaves
an odd factor that none of them covers, `hadamard_factors` says so.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np


def hadamard(order: int) -> np.ndarray:
    """A Hadamard matrix, int8 [order, order].

    Raises:
        ValueError: No construction here gives this order.
    """
    orders, rest = hadamard_factors(order)
    if rest != 1:
        raise ValueError(f"no Hadamard matrix of order {order} can be constructed here")
    matrix = np.ones((1, 1), np.int8)
    for factor in orders:
        matrix = np.kron(matrix, elementary(factor))
    return matrix


def hadamard_factors(width: int) -> tuple[tuple[int, ...], int]:
    """Orders of elementary matrices whose Kronecker product acts on `width` channels.

    Args:
        width: A positive number of channels.

    Returns:
        The orders, 2 or Paley's, and the odd factor that they leave; 1 where a Hadamard matrix of
        order `width` was found.

    Raises:
        ValueError: `width` is not positive.
    """
    if width < 1:
        raise ValueError(f"a width of {width} is not positive")
    twos = (width & -width).bit_length() - 1
    odd = width >> twos
    for rest in _divisors(odd):
        orders = _cover(odd // rest, twos)
        if orders is not None:
            return orders, rest
    return (2,) * twos, odd


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _cover(odd: int, twos: int) -> tuple[int, ...] | None:
    """Elementary orders whose product is ``odd 2^twos``, small Paley orders first."""
    if odd == 1:
        return (2,) * twos
    for part in _divisors(odd)[1:]:
        for power in range(2, twos + 1):
            order = part << power
            if _paley_field(order):
                others = _cover(odd // part, twos - power)
                if others is not None:
                    return (order, *others)
    return None


def _paley_field(order: int) -> int:
    """Size of the field that gives a Hadamard matrix of this order, or 0."""
    if prime_power(order - 1) and order % 4 == 0:
        return order - 1
    half = order // 2 - 1
    return half if order % 4 == 0 and half % 4 == 1 and prime_power(half) else 0


def elementary(order: int) -> np.ndarray:
    """The matrix of order 2, or Paley's of this order, int8.

    Raises:
        ValueError: Paley's constructions do not give this order.
    """
    core = np.array([[1, 1], [1, -1]], np.int8)
    if order == 2:
        return core
    field = _paley_field(order)
    if not field:
        raise ValueError(f"Paley's constructions give no Hadamard matrix of order {order}")
    size = field + 1
    bordered = np.ones((size, size), np.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = _characters(field)
    unit = np.eye(size, dtype=np.int8)
    if field % 4 == 3:
        bordered[1:, 0] = -1
        return bordered + unit
    return np.kron(bordered, core) + np.kron(unit, np.array([[1, -1], [-1, -1]], np.int8))


def prime_power(number: int) -> tuple[int, int] | None:
    """``(p, k)`` with ``p^k = number`` and p prime, or None."""
    if number < 2:
        return None
    prime = next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
    exponent = 0
    while number % prime == 0:
        number //= prime
        exponent += 1
    return (prime, exponent) if number == 1 else None


def _characters(field: int) -> np.ndarray:
    """1 where ``a - b`` is a square of the field, -1 where it is not, 0 on the diagonal."""
    found = prime_power(field)
    if found is None:
        raise ValueError(f"no field has {field} elements")
    prime, exponent = found
    elements = np.array(list(product(range(prime), repeat=exponent)))
    weights = prime ** np.arange(exponent)[::-1]
    character = np.full(field, -1, np.int8)
    character[0] = 0
    character[_powers_of_generator(prime, exponent)[::2] @ weights] = 1
    differences = (elements[:, None] - elements[None]) % prime
    return character[differences @ weights]


@cache
def _powers_of_generator(prime: int, exponent: int) -> np.ndarray:
    """All powers of a generator of the field's multiplicative group, from 1 on.

    Elements are coefficients, highest first. For a prime field the generator is a number; else x,
    modulo the first polynomial under which its powers run through the whole group.
    """
    size = prime**exponent - 1
    candidates = (
        ((g,) for g in range(2, prime)) if exponent == 1 else product(range(prime), repeat=exponent)
    )
    for candidate in candidates:
        powers = _walk(candidate, prime, exponent, size)
        if powers is not None:
            return powers
    raise ValueError(f"no generator of the field of {prime}^{exponent} elements was found")


def _walk(candidate: tuple[int, ...], prime: int, exponent: int, size: int) -> np.ndarray | None:
    """Powers of the candidate generator, or None if it is no unit or back at one too early."""
    if not candidate[-1]:
        return None
    one = np.zeros(exponent, np.int64)
    one[-1] = 1
    powers = [one]
    while len(powers) < size:
        last = powers[-1]
        if exponent == 1:
            following = last * candidate[0] % prime
        else:
            shifted = np.append(last[1:], 0)
            following = (shifted + last[0] * np.array(candidate)) % prime
        if (following == one).all() or not following.any():
            return None
        powers.append(following)
    return np.stack(powers)
