"""The order of weights and of transition scales, which no comparison sort has made."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.kernels.cpu import events

SIZES = [0, 1, 2, 63, 128, 1000, 5000]


def rows(kind: str, size: int) -> np.ndarray:
    rng = np.random.default_rng(size)
    plain = rng.standard_normal(size)
    return {
        "gaussian": plain,
        "heavy tails": plain**5,
        "one outlier": np.where(np.arange(size) == size // 2, 3.0, plain * 1e-9),
        "nearly equal": 1 + 1e-12 * plain,
        "few values": np.round(plain),
        "zeros": np.zeros(size),
        "denormal": plain * 1e-310,
        "ascending": np.arange(size) - size / 3,
    }[kind]


KINDS = ["gaussian", "heavy tails", "one outlier", "nearly equal", "few values", "zeros"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [*KINDS, "denormal", "ascending"])
def test_columns_are_in_order_of_size(kind: str, size: int) -> None:
    weights = rows(kind, size)
    order = events.order_by_size(weights)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))
    np.testing.assert_array_equal(np.abs(weights)[order], np.sort(np.abs(weights))[::-1])


@pytest.mark.parametrize("levels", [np.arange(-4.0, 4), np.arange(-64.0, 64), np.arange(4.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_transition_is_met_once_and_in_order(kind: str, levels: np.ndarray) -> None:
    weights = rows(kind, 37)
    midpoints = (levels[1:] + levels[:-1]) / 2
    with np.errstate(divide="ignore"):
        scales = weights[:, None] / midpoints
    column, which = np.nonzero((weights[:, None] * midpoints > 0) & np.isfinite(scales))
    expected = sorted(
        (scales[i, k], i, np.sign(weights[i])) for i, k in zip(column, which, strict=True)
    )
    size = len(weights) * len(midpoints)
    positions, columns, steps = np.empty(size), np.empty(size, np.int64), np.empty(size, np.int64)
    start = np.empty(len(weights), np.int64)
    zero = int(np.searchsorted(midpoints, 0.0))
    count = events.transitions(weights, midpoints, zero, positions, columns, steps, start)
    assert (np.diff(positions[:count]) <= 0).all()
    found = zip(positions[:count], columns[:count], steps[:count], strict=True)
    assert sorted(found) == expected
