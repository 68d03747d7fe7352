"""Mismatch coefficients against scans and least squares on the tokens themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.calibration.moments import Moments
from pipeline.errors import InputError
from pipeline.quantization.mismatch import (
    alpha_closed_form,
    alpha_reachable,
    alpha_shrinkage,
    alpha_split_halves,
    sampled_alpha,
)
from tests.pipeline.quantization.problems import correlated

WIDTH, ROWS = 12, 7


def streams(seed: int, tokens: int, reachable: float, noise: float):
    """X and Xq whose difference is partly a linear map of Xq, partly noise; and weights.

    Both parts live at a strength relative to Xq.
    """
    rng = np.random.default_rng(seed)
    Xq = correlated(rng, WIDTH, tokens)
    scale = np.abs(Xq).mean()
    linear = Xq @ rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    X = Xq + reachable * linear + noise * scale * rng.standard_normal(Xq.shape)
    return X, Xq, rng.standard_normal((ROWS, WIDTH))


def moments(X: np.ndarray, Xq: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(Xq.T @ Xq), torch.tensor(Xq.T @ X)


def halves(X: np.ndarray, Xq: np.ndarray) -> tuple[torch.Tensor, ...]:
    middle = len(X) // 2
    return (*moments(X[:middle], Xq[:middle]), *moments(X[middle:], Xq[middle:]))


def differences(X: np.ndarray, Xq: np.ndarray) -> torch.Tensor:
    return torch.tensor((X - Xq).T @ (X - Xq))


def correction(X: np.ndarray, Xq: np.ndarray, W: np.ndarray, damping: float = 0.0) -> np.ndarray:
    """Ridge regression of the mismatch on Xq, from the tokens."""
    ridge = np.sqrt(damping * (Xq**2).sum(0).mean()) * np.eye(WIDTH)
    inputs = np.concatenate([Xq, ridge])
    outputs = np.concatenate([(X - Xq) @ W.T, np.zeros((WIDTH, len(W)))])
    return np.linalg.lstsq(inputs, outputs, rcond=None)[0].T


def scanned(loss) -> float:
    """Minimiser of a parabola over [0, 1], by three ever finer scans."""
    low, high = 0.0, 1.0
    for _ in range(3):
        grid = np.linspace(low, high, 401)
        best = grid[np.argmin([loss(a) for a in grid])]
        step = grid[1] - grid[0]
        low, high = max(0.0, best - step), min(1.0, best + step)
    return float(best)


@pytest.mark.parametrize("share", [-0.5, 0.1, 0.3, 0.8, 1.7])
def test_closed_form_is_the_minimum_of_a_scan(share: float) -> None:
    X, Xq, W = streams(0, 60, reachable=0.2, noise=0.1)
    R = correction(X, Xq, W)
    V = W + share * R + 0.01 * np.random.default_rng(1).standard_normal(W.shape)

    def loss(a: float) -> float:
        return float(((Xq @ (V - W - a * R).T) ** 2).sum())

    got = alpha_closed_form(torch.tensor(V), torch.tensor(W), *moments(X, Xq))
    assert got == pytest.approx(scanned(loss), abs=1e-6)
    assert (got in (0.0, 1.0)) == (share < 0 or share > 1)


@pytest.mark.parametrize("tokens", [40, 41, 200])
@pytest.mark.parametrize("damping", [1e-9, 0.05])
def test_split_halves_is_the_minimum_of_a_scan_of_held_out_losses(
    tokens: int, damping: float
) -> None:
    for seed in range(4):
        X, Xq, W = streams(seed, tokens, reachable=0.05, noise=0.2)
        middle = tokens // 2
        parts = (X[:middle], Xq[:middle]), (X[middle:], Xq[middle:])
        fits = [correction(*part, W, damping) for part in parts]

        def loss(a: float) -> float:
            return sum(
                ((x @ W.T - xq @ (W + a * R).T) ** 2).sum()  # noqa: B023
                for (x, xq), R in zip(parts, fits[::-1], strict=True)  # noqa: B023
            )

        got = alpha_split_halves(*halves(X, Xq), torch.tensor(W), damping)
        assert got == pytest.approx(scanned(loss), abs=1e-6)
        whole = alpha_split_halves(*halves(X, Xq), torch.tensor(W), damping, extrapolate=True)
        assert whole == pytest.approx(2 * got / (1 + got))


def test_halves_that_disagree_count_by_what_they_lose() -> None:
    """The pooled minimum, not the mean of two ratios: an empty half has no say."""
    X, Xq, W = streams(3, 400, reachable=0.2, noise=0.05)
    X[:200] = Xq[:200]
    H1, G1, H2, G2 = halves(X, Xq)
    got = alpha_split_halves(H1, G1, H2, G2, torch.tensor(W))
    # Fitted on the first half there is no correction; fitted on the second it only harms the first.
    assert got == 0.0


def test_a_reachable_mismatch_is_corrected_and_noise_is_not() -> None:
    found = []
    for seed in range(20):
        for strength in ({"reachable": 0.3, "noise": 0.02}, {"reachable": 0.0, "noise": 0.3}):
            X, Xq, W = streams(seed, 600, **strength)
            W = torch.tensor(W)
            H, G = moments(X, Xq)
            found.append(alpha_split_halves(*halves(X, Xq), W, 1e-6))
            found.append(alpha_shrinkage(W, H, G, differences(X, Xq), 600, 1e-6))
            found.append(alpha_reachable(W, H, G, differences(X, Xq)))
    split, shrinkage, reachable = np.reshape(found, (20, 2, 3)).T
    assert split[0].min() > 0.98
    assert shrinkage[0].min() > 0.98
    assert reachable[0].min() > 0.9
    # Noise leaves chance correlations, of either sign; the negative ones are cut off at zero.
    assert split[1].mean() < 0.06
    assert shrinkage[1].mean() < 0.12
    assert reachable[1].mean() < 0.03


def test_estimates_approach_the_best_coefficient_on_fresh_tokens() -> None:
    """The ones that aim at it: split halves stepped up to all tokens, and shrinkage."""
    wanted, found = [], []
    for seed in range(12):
        X, Xq, W = streams(seed, 20000, reachable=0.06, noise=0.3)
        few, rest = slice(0, 150), slice(150, None)
        fresh = Xq[rest] @ correction(X[few], Xq[few], W).T
        mismatch = (X[rest] - Xq[rest]) @ W.T
        wanted.append((fresh * mismatch).sum() / (fresh**2).sum())
        H, G = moments(X[few], Xq[few])
        W = torch.tensor(W)
        found.append(
            (
                alpha_split_halves(*halves(X[few], Xq[few]), W, 1e-9, extrapolate=True),
                alpha_shrinkage(W, H, G, differences(X[few], Xq[few]), 150, 1e-9),
            )
        )
    assert 0.2 < np.mean(wanted) < 0.8
    np.testing.assert_allclose(np.mean(found, axis=0), np.mean(wanted), atol=0.08)


def test_reachable_share_is_the_explained_variance_of_the_regression() -> None:
    X, Xq, W = streams(4, 80, reachable=0.1, noise=0.1)
    mismatch = (X - Xq) @ W.T
    fit = Xq @ correction(X, Xq, W).T
    got = alpha_reachable(torch.tensor(W), *moments(X, Xq), differences(X, Xq))
    assert got == pytest.approx((fit**2).sum() / (mismatch**2).sum(), rel=1e-9)
    assert got == pytest.approx(1 - ((mismatch - fit) ** 2).sum() / (mismatch**2).sum(), rel=1e-9)


@pytest.mark.parametrize("damping", [1e-12, 0.1])
def test_shrinkage_from_tokens(damping: float) -> None:
    X, Xq, W = streams(5, 50, reachable=0.05, noise=0.2)
    mismatch = (X - Xq) @ W.T
    fit = Xq @ correction(X, Xq, W, damping).T
    H, G = moments(X, Xq)
    ridge = damping * (Xq**2).sum(0).mean() * np.eye(WIDTH)
    freedom = np.trace(Xq @ np.linalg.inv(H.numpy() + ridge) @ Xq.T)
    noise = ((mismatch - fit) ** 2).sum() / (50 - freedom)
    expected = 1 - freedom * noise / (fit**2).sum()
    got = alpha_shrinkage(torch.tensor(W), H, G, differences(X, Xq), 50, damping)
    assert 0 < expected < 1
    assert got == pytest.approx(expected, rel=1e-6)
    assert alpha_shrinkage(torch.tensor(W), H, G, differences(X, Xq), 5, damping) == 0.0


def every_estimate(X, Xq, W, V) -> list[float]:
    H, G = moments(X, Xq)
    W, V = torch.tensor(W), torch.tensor(V)
    return [
        alpha_closed_form(V, W, H, G),
        alpha_reachable(W, H, G, differences(X, Xq)),
        alpha_shrinkage(W, H, G, differences(X, Xq), len(X)),
        alpha_split_halves(*halves(X, Xq), W),
    ]


def test_units_of_inputs_and_weights_do_not_matter() -> None:
    X, Xq, W = streams(6, 100, reachable=0.1, noise=0.15)
    V = W + 0.6 * correction(X, Xq, W)
    expected = every_estimate(X, Xq, W, V)
    assert all(0.05 < alpha < 0.95 for alpha in expected)
    got = every_estimate(1e-4 * X, 1e-4 * Xq, 1e3 * W, 1e3 * V)
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_no_mismatch_or_no_weights_is_zero_without_nan(weight: float) -> None:
    X, Xq, W = streams(7, 100, reachable=0.1, noise=0.1)
    X = Xq if weight else X
    W = weight * W
    assert every_estimate(X, Xq, W, W + 0.1) == [0.0] * 4


def test_rounding_error_in_equal_sums_is_no_mismatch() -> None:
    _, Xq, W = streams(8, 100, reachable=0.1, noise=0.1)
    H = torch.tensor(Xq.T @ Xq)
    G = H * (1 + 1e-15 * torch.tensor(np.random.default_rng(0).standard_normal(H.shape)))
    W = torch.tensor(W)
    assert not torch.equal(G, H)
    assert alpha_closed_form(W + 0.1, W, H, G) == 0.0
    assert alpha_split_halves(H, G, H, G, W) == 0.0


def test_nan_is_an_error() -> None:
    X, Xq, W = streams(9, 50, reachable=0.1, noise=0.1)
    H, G = moments(X, Xq)
    G[1, 2] = float("nan")
    with pytest.raises(InputError, match="NaN or Inf"):
        alpha_closed_form(torch.tensor(W), torch.tensor(W), H, G)


@pytest.mark.parametrize(("m", "mean"), [(0.5, 0.1816901), (1.0, 0.25), (5.0, 0.3769531)])
def test_sampled_coefficients_are_folded_beta(m: float, mean: float) -> None:
    """Means of min(a, 1 - a): 1/2 - 1/pi, 1/4, and 1/2 - 63/512 by hand."""
    drawn = sampled_alpha(20000, m, np.random.default_rng(0))
    assert drawn.dtype == torch.float64
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) <= 0.5
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.005)
    assert torch.equal(drawn, sampled_alpha(20000, m, np.random.default_rng(0)))


@pytest.mark.parametrize("m", [0.0, -1.0, float("nan")])
def test_an_impossible_parameter_is_refused(m: float) -> None:
    with pytest.raises(InputError, match="not positive"):
        sampled_alpha(3, m, np.random.default_rng(0))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(seed))


def test_coefficients_scale_each_samples_mismatch() -> None:
    X, Xq = batch(0), batch(1)
    shares = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    taken = Moments(8, cross=True, mismatch=True, name="m")
    taken.add(Xq, X, 0, shares)
    expected = torch.zeros(8, 8, dtype=torch.float64)
    full = torch.zeros(8, 8, dtype=torch.float64)
    for share, x, xq in zip(shares, X.double(), Xq.double(), strict=True):
        expected += xq.T @ (xq + share * (x - xq))
        full += (x - xq).T @ (x - xq)
    torch.testing.assert_close(taken.cross, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taken.mismatch, full, rtol=1e-5, atol=1e-5)
    plain = Moments(8, cross=True, name="m")
    plain.add(Xq, X, 0)
    assert torch.equal(plain.hessian, taken.hessian)
    assert plain.mismatch is None
    flat = (part.flatten(0, 1) for part in (Xq, X))
    xq, x = flat
    assert torch.equal(plain.cross, (xq.T @ x).double())


def test_coefficients_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="one coefficient per sample"):
        Moments(8, cross=True, name="m").add(batch(1), batch(0), 0, torch.ones(1))
    with pytest.raises(ValueError, match="float model's inputs"):
        Moments(8, cross=False, name="m").add(batch(1), None, 0, torch.ones(4))
    with pytest.raises(ValueError, match="float model's inputs"):
        Moments(8, cross=False, mismatch=True, name="m").add(batch(1), None, 0)
