"""Hadamard matrices against their definition, and the widths of real models."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.transforms.hadamard import elementary, hadamard, hadamard_factors, prime_power

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64, 72, 76, 80, 100, 108]
"""Up to 100, of all multiples of 4 only 92 is beyond Paley and Sylvester. 28, 52, 100: fields of
27, 25 and 49 elements."""

WIDTHS = {
    "llama 2 7B": (4096, 11008),
    "llama 2 13B": (5120, 13824),
    "llama 3": (2048, 3072, 4096, 8192, 14336, 28672),
    "qwen 2": (896, 1536, 3584, 4864, 8960, 18944, 27648, 29568),
    "qwen 3": (1024, 2560, 9728, 12288, 17408, 25600, 6144),
    "ours": (192, 512, 448, 1376),
}


@pytest.mark.parametrize("order", [*ORDERS, *(n for n in range(4, 100, 4) if n != 92)])
def test_rows_are_orthogonal_and_entries_are_signs(order: int) -> None:
    matrix = hadamard(order).astype(int)
    assert matrix.shape == (order, order)
    assert (np.abs(matrix) == 1).all()
    assert (matrix @ matrix.T == order * np.eye(order, dtype=int)).all()


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64])
def test_powers_of_two_are_sylvesters(order: int) -> None:
    ones = np.array([[(i & j).bit_count() for j in range(order)] for i in range(order)])
    assert (hadamard(order) == (-1) ** ones).all()


@pytest.mark.parametrize("family", WIDTHS)
def test_real_widths_leave_nothing_over(family: str) -> None:
    for width in WIDTHS[family]:
        orders, rest = hadamard_factors(width)
        assert rest == 1, width
        assert np.prod(orders) == width


@pytest.mark.parametrize(
    ("width", "rest"), [(3, 3), (92, 23), (6, 3), (10, 5), (1, 1), (84, 1), (46, 23)]
)
def test_what_is_left_over_is_named(width: int, rest: int) -> None:
    orders, left = hadamard_factors(width)
    assert left == rest
    assert int(np.prod(orders, dtype=int)) * rest == width


@pytest.mark.parametrize("order", [3, 6, 92])
def test_orders_that_cannot_be_had_are_refused(order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order}"):
        hadamard(order)
    with pytest.raises(ValueError, match=f"order {order}"):
        elementary(order)


@pytest.mark.parametrize("width", [0, -4])
def test_widths_must_be_positive(width: int) -> None:
    with pytest.raises(ValueError, match="not positive"):
        hadamard_factors(width)


def test_prime_powers() -> None:
    found = {n: prime_power(n) for n in range(130)}
    wanted = {p**k: (p, k) for p in (2, 3, 5, 7, 11) for k in range(1, 8) if p**k < 130}
    wanted |= {n: (n, 1) for n in range(13, 130) if all(n % d for d in range(2, n))}
    assert {n: value for n, value in found.items() if value} == wanted
