"""How much of the input mismatch the target should correct: the coefficient alpha.

With X the float model's inputs and Xq the quantized model's, ``T = W + alpha R`` where the full
correction ``R = W (G - H)' H^-1`` is the least-squares fit of the mismatch ``W (X - Xq)'`` by
``R Xq'`` (CoreQ, arXiv 2602.05902). The fit follows the calibration tokens' noise as well as what
other tokens share, so the whole of it may be too much.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.quantization.objective import LayerObjective

NEGLIGIBLE = 1e-24
"""A squared mismatch below this fraction of the squared output is rounding error."""


def alpha_closed_form(quantized: Tensor, weight: Tensor, hessian: Tensor, cross: Tensor) -> float:
    """The coefficient whose target is closest to weights that are already quantized.

    Minimises ``tr((V - W - a R) H (V - W - a R)')`` over a in [0, 1], the ``optimize`` variant of
    CoreQ's first version; the layer is quantized again for the new target.

    Args:
        quantized: Dequantized weights V, [out, in].
        weight: Float weights W, [out, in].
        hessian: Damped H, [in, in].
        cross: ``G = Xq' X`` with the same damping, [in, in].
    """
    W = weight.double()
    correction, shift = _correction(W, hessian.double(), cross.double())
    return _share(
        ((quantized.double() - W) * shift).sum(),
        (correction * shift).sum(),
        _energy(W, hessian.double()),
    )


def alpha_reachable(weight: Tensor, hessian: Tensor, cross: Tensor, mismatch: Tensor) -> float:
    """Share of the mismatch that new weights can reach, the published coefficient of CoreQ.

    ``|R Xq'|^2 / |W (X - Xq)'|^2``: the mismatch splits into what a change of the weights
    reproduces and what is orthogonal to it (arXiv 2602.05902 v2, coefficient ``corr`` of the
    authors' code, summed over all rows).

    Args:
        weight: Float weights, [out, in].
        hessian: Damped H, [in, in].
        cross: ``G = Xq' X`` with the same damping, [in, in].
        mismatch: ``(X - Xq)' (X - Xq)``, [in, in].
    """
    W = weight.double()
    correction, shift = _correction(W, hessian.double(), cross.double())
    return _share(
        (correction * shift).sum(),
        _energy(W, mismatch.double()),
        _energy(W, hessian.double()),
    )


def alpha_shrinkage(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor,
    mismatch: Tensor,
    tokens: int,
    damping: float = 0.01,
) -> float:
    """James-Stein coefficient: the fit's energy less what noise alone would have put into it.

    If the residual N of the fit is noise of equal strength in every token, it adds
    ``d |N|^2 / (tokens - d)`` to the fit's energy, with ``d = tr(H H_damped^-1)`` its degrees of
    freedom. Neighbouring tokens are no independent samples, which this does not see.

    Args:
        weight: Float weights, [out, in].
        hessian: ``Xq' Xq`` without damping, [in, in].
        cross: ``Xq' X`` without damping, [in, in].
        mismatch: ``(X - Xq)' (X - Xq)``, [in, in].
        tokens: Number of tokens in the sums.
        damping: As in `LayerObjective.from_moments`.

    Returns:
        Coefficient from 0 to 1; 0 if the tokens are too few to tell.

    Raises:
        InputError: As `LayerObjective.from_moments`.
    """
    W, H = weight.double(), hessian.double()
    objective = LayerObjective.from_moments(H, cross, damping=damping)
    correction = objective.target(W) - W
    freedom = float(torch.linalg.solve(objective.hessian, H).trace())
    if tokens <= freedom:
        return 0.0
    fitted = _energy(correction, H)
    shift = W @ (cross.double() - H).T
    residual = _energy(W, mismatch.double()) - 2 * (correction * shift).sum() + fitted
    noise = freedom / (tokens - freedom) * residual
    return _share(fitted - noise, fitted, _energy(W, H))


def alpha_split_halves(
    first_hessian: Tensor,
    first_cross: Tensor,
    second_hessian: Tensor,
    second_cross: Tensor,
    weight: Tensor,
    damping: float = 0.01,
    *,
    extrapolate: bool = False,
) -> float:
    """The coefficient that is best on tokens which the correction was not fitted to.

    R is fitted on one half of the calibration tokens; on the other half
    ``|X W' - Xq (W + a R)'|^2 = const - 2 a <R, W (G - H)'> + a^2 tr(R H R')``. Both directions are
    added and the sum is minimised over a in [0, 1]. Assumes nothing about the noise, if the halves
    share no text.

    Args:
        first_hessian: ``Xq' Xq`` of one half without damping, [in, in].
        first_cross: ``Xq' X`` of the same half without damping, [in, in].
        second_hessian: As the first, of the other half.
        second_cross: As the first, of the other half.
        weight: Float weights, [out, in].
        damping: As in `LayerObjective.from_moments`, for each half.
        extrapolate: Step from a correction fitted on half the tokens up to one fitted on all, which
            holds half the noise and deserves ``2 a / (1 + a)`` (the Spearman-Brown formula).

    Raises:
        InputError: As `LayerObjective.from_moments`.
    """
    W = weight.double()
    halves = [
        (H.double(), G.double())
        for H, G in ((first_hessian, first_cross), (second_hessian, second_cross))
    ]
    gain, cost, energy = (torch.zeros((), dtype=W.dtype, device=W.device) for _ in range(3))
    for (fit_hessian, fit_cross), (H, G) in (halves, halves[::-1]):
        objective = LayerObjective.from_moments(fit_hessian, fit_cross, damping=damping)
        correction = objective.target(W) - W
        gain += (correction * (W @ (G - H).T)).sum()
        cost += _energy(correction, H)
        energy += _energy(W, H)
    held_out = _share(gain, cost, energy)
    return 2 * held_out / (1 + held_out) if extrapolate else held_out


def sampled_alpha(samples: int, m: float, generator: np.random.Generator) -> Tensor:
    """Coefficients of calibration samples, ``min(a, 1 - a)`` with ``a ~ Beta(m, m)``.

    Each scales its own sample's mismatch while G is summed (`Moments.add`), the final recipe of
    CoreQ's first version; the target is then taken with alpha 1. They average to less than a half.

    Args:
        samples: Number of samples.
        m: Parameter of the distribution, positive; large values gather at one half.
        generator: Own generator, seeded by the caller.

    Returns:
        float64 [samples], in [0, 0.5].

    Raises:
        InputError: m is not positive.
    """
    if not m > 0:
        raise InputError(
            f"the parameter {m:g} of the sampled mismatch coefficient is not positive",
            fix="0.5 spreads the coefficients, 5 gathers them near one half",
        )
    drawn = torch.from_numpy(generator.beta(m, m, samples))
    return torch.minimum(drawn, 1 - drawn)


def _correction(weight: Tensor, hessian: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """The full correction R, and ``R H = W (G - H)'``."""
    shift = weight @ (cross - hessian).T
    lower = torch.linalg.cholesky(hessian)
    return torch.cholesky_solve(shift.T, lower).T, shift


def _energy(rows: Tensor, moment: Tensor) -> Tensor:
    return ((rows @ moment) * rows).sum()


def _share(part: Tensor, whole: Tensor, energy: Tensor) -> float:
    """``part / whole`` within [0, 1], and 0 where there is no mismatch to speak of."""
    if not torch.isfinite(part + whole):
        raise InputError(
            "the mismatch of the inputs is NaN or Inf",
            why="an activation overflowed, or the weights are not finite",
            fix="check the checkpoint, and the calibration text for degenerate samples",
        )
    if whole <= NEGLIGIBLE * energy:
        return 0.0
    return float((part / whole).clamp(0, 1))
