"""Small random problems and slow, obvious oracles, written without the code under test."""

from __future__ import annotations

import numpy as np

GRIDS = {
    "int2": np.arange(-2, 2, dtype=float),
    "int3": np.arange(-4, 4, dtype=float),
    "int4": np.arange(-8, 8, dtype=float),
    "int3 narrow": np.arange(-3, 4, dtype=float),
    "ternary": np.array([-1.0, 0.0, 1.0]),
    "q2_0": np.array([-1.0, 0.0, 1.0, 2.0]),
    "half levels": np.array([-1.5, -0.5, 0.5, 1.5]),
    "fp4": np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6.0]),
    "iq4_nl": np.array(
        [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0]
    ),
}


def correlated(rng: np.random.Generator, width: int, tokens: int | None = None) -> np.ndarray:
    """Inputs [tokens, width] with unequal, correlated columns."""
    X = rng.standard_normal((tokens or 3 * width + 2, width))
    X = X * (np.arange(1, width + 1) ** -0.7)[rng.permutation(width)]
    return X @ (np.eye(width) + 0.3 * rng.standard_normal((width, width)))


def weights(rng: np.random.Generator, width: int, kind: int) -> np.ndarray:
    """Heavy-tailed weights; kinds 1 to 3 have exact ties and zeros, equal values, or only zeros."""
    w = rng.standard_t(4, width)
    if kind == 1:
        return np.round(w * 2) / 2
    if kind == 2:
        return np.full(width, w[0])
    if kind == 3:
        return np.zeros(width)
    return w


def energy(v: np.ndarray, H: np.ndarray, b: np.ndarray) -> float:
    return float(v @ H @ v - 2 * v @ b)


def nearest_codes(w: np.ndarray, s: float, grid: np.ndarray) -> list[np.ndarray]:
    """Codes that round w / s to nearest, just above and just below s.

    They differ where a weight sits on a midpoint; equal weights cross it together. A zero between
    two levels takes the upper one.
    """

    def codes(scale: float) -> np.ndarray:
        distance = np.abs(w[:, None] / scale - grid)[:, ::-1]
        return grid[len(grid) - 1 - distance.argmin(1)]

    return [codes(s * (1 + 1e-11)), codes(s * (1 - 1e-11))]


def transitions(w: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """All scales, of both signs, at which a code changes."""
    midpoints = (grid[:-1] + grid[1:]) / 2
    midpoints = midpoints[midpoints != 0]
    found = np.unique((w[:, None] / midpoints).ravel())
    return found[found != 0]


def scan(
    w: np.ndarray, H: np.ndarray, b: np.ndarray, grid: np.ndarray, signed: bool, n: int = 400
) -> float:
    """Smallest energy over a dense scan of scales, the transitions and points between them."""
    marks = transitions(w, grid)
    if len(marks) == 0:
        return 0.0
    reach = 1.5 * np.abs(marks).max()
    between = (marks[1:] + marks[:-1]) / 2
    scales = np.concatenate([np.linspace(reach / n, reach, n), np.abs(marks), np.abs(between)])
    candidates = np.concatenate([scales, -scales, marks, between]) if signed else scales
    best = 0.0
    for s in candidates[candidates != 0]:
        for q in nearest_codes(w, s, grid):
            best = min(best, energy(s * q, H, b))
    return best
