"""How much of the mismatch each linear corrects: what to measure for it, how to solve with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.calibration.streams import MomentOptions, SiteMoments
from pipeline.quantization.layer import LayerResult
from pipeline.quantization.mismatch import (
    alpha_closed_form,
    alpha_reachable,
    alpha_shrinkage,
    alpha_split_halves,
    sampled_alpha,
)
from pipeline.quantization.objective import LayerObjective

Estimate = Literal["fixed", "split-halves", "shrinkage", "reachable", "closed-form", "sampled"]

SAMPLED_SPREAD = 5.0
"""Parameter of the Beta distribution of sampled shares, as in CoreQ's first version."""


def moment_options(estimate: Estimate, held_out: float, samples: int, seed: int) -> MomentOptions:
    """What an estimate needs to be accumulated.

    Args:
        estimate: The estimate.
        held_out: Share of the windows that is kept apart.
        samples: Number of windows.
        seed: Seed of sampled shares.
    """
    drawn = None
    if estimate == "sampled":
        drawn = sampled_alpha(samples, SAMPLED_SPREAD, np.random.default_rng(seed))
    return MomentOptions(
        held_out=held_out,
        halves=estimate == "split-halves",
        mismatch=estimate in ("shrinkage", "reachable"),
        coefficients=drawn,
    )


def solve_with_estimate(
    weights: list[Tensor],
    moments: SiteMoments,
    objective: LayerObjective,
    solve: Callable[..., LayerResult],
    estimate: Estimate,
    share: float,
    damping: float,
) -> LayerResult:
    """Solve stacked linears, each with its own share of the mismatch correction.

    Args:
        weights: Float weights of each linear, [out, in].
        moments: What was accumulated under `moment_options`.
        objective: The damped sums.
        solve: ``solve(stacked weights, mismatch=[out, 1])``.
        estimate: The estimate of the share.
        share: What the estimate is multiplied with.
        damping: That of the objective.
    """
    stacked = torch.cat(weights)
    if estimate in ("fixed", "sampled") or objective.cross is None:
        return solve(stacked, mismatch=None)
    if estimate == "closed-form":
        values = solve(stacked, mismatch=None).quantized.dequantize()
        pairs = zip(values.split([len(w) for w in weights]), weights, strict=True)
        shares = [alpha_closed_form(v, w, objective.hessian, objective.cross) for v, w in pairs]
    else:
        shares = [_share(w, moments, objective, estimate, damping) for w in weights]
    rows = [torch.full((len(w), 1), share * a) for a, w in zip(shares, weights, strict=True)]
    return solve(stacked, mismatch=torch.cat(rows).to(stacked))


def _share(
    weight: Tensor,
    moments: SiteMoments,
    objective: LayerObjective,
    estimate: Estimate,
    damping: float,
) -> float:
    solving = moments.solving
    if estimate == "split-halves" and moments.halves is not None:
        first, second = moments.halves
        if first.cross is not None and second.cross is not None:
            return alpha_split_halves(
                first.hessian,
                first.cross,
                second.hessian,
                second.cross,
                weight,
                damping,
                extrapolate=True,
            )
    G, D = solving.cross, solving.mismatch
    if objective.cross is None or G is None or D is None:
        return 1.0  # one batch has no halves
    if estimate == "reachable":
        return alpha_reachable(weight, objective.hessian, objective.cross, D)
    return alpha_shrinkage(weight, solving.hessian, G, D, solving.tokens, damping)
