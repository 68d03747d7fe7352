"""MagR: smaller largest weights for nearly the same outputs, before codes are chosen.

Zhang et al., arXiv 2406.00800, minimize ``1/2 |X (v - w)|^2 + a |v|_inf`` for every row w by
proximal gradient descent. This changes the function a little: it is part of quantizing, and not a
rewrite that keeps the function.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 200
"""Of descent, as published."""


def reduce_magnitude(weight: Tensor, hessian: Tensor, strength: float) -> Tensor:
    """Rows whose largest weights are smaller, float64 [out, in].

    Args:
        weight: Rows w, [out, in].
        hessian: H, positive semidefinite, [in, in].
        strength: The penalty is ``a = strength * lambda * |w|_inf`` with lambda the largest
            eigenvalue of H, so that neither scale of inputs nor of weights matters; 0 does nothing.

    Returns:
        v after `STEPS` steps ``v <- prox(v - (v - w) H / lambda)`` from w. The proximal operator of
        ``t |.|_inf`` is what the projection on the l1 ball of radius t leaves over.
    """
    W = weight.double()
    H = hessian.double()
    largest = float(torch.linalg.eigvalsh(H)[-1])
    if strength == 0 or largest <= 0:
        return W
    radius = strength * W.abs().amax(1)
    V = W
    for _ in range(STEPS):
        moved = V - (V - W) @ H / largest
        V = moved - project_on_l1_balls(moved, radius)
    return V


def project_on_l1_balls(rows: Tensor, radius: Tensor) -> Tensor:
    """The nearest point of each row's l1 ball (Duchi et al. 2008, figure 1), [rows, n].

    Args:
        rows: Points, [rows, n].
        radius: Of each ball, not negative, [rows].
    """
    sizes = rows.abs()
    falling = sizes.sort(dim=1, descending=True).values
    excess = (falling.cumsum(1) - radius[:, None]) / torch.arange(1, rows.shape[1] + 1).to(rows)
    count = (falling > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, count - 1).clamp_min(0)
    return rows.sign() * (sizes - threshold).clamp_min(0)
