"""Piecewise Scale Optimization of one scale per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.device import gpu_form
from pipeline.quantization.formats import ScaleLattice

CEILING_MARGIN = 1e-3
"""Relative slack of K, far above its rounding error for the pivots that are accepted."""

ROUNDING = 1e-12
"""Relative rounding error that a sum of a row's float64 products can have, generously."""

SMALLEST_PIVOT = 1e-8
"""Ratio of squared pivots of the Cholesky factor of H below which K is not trusted."""


@dataclass(frozen=True)
class SweepResult:
    """Best scale of each row, its codes, and the objective ``s^2 q'Hq - 2 s q'b`` there.

    Attributes:
        scales: float64 [rows].
        level_indices: int64 [rows, inputs], indices into the levels.
        objective: float64 [rows]; 0 is the value of the all-zero row, so never positive.
    """

    scales: Tensor
    level_indices: Tensor
    objective: Tensor


def piso_sweep(
    weights: Tensor,
    hessian: Tensor,
    linear: Tensor | None,
    levels: Tensor,
    *,
    signed: bool,
    lattice: ScaleLattice | None = None,
    clamp: bool = True,
) -> SweepResult:
    """Exact minimum over s of ``s^2 q'Hq - 2 s q'b`` with ``q = nearest(w / s)``, for every row.

    Piecewise Scale Optimization, arXiv 2606.10890, Algorithm 1, extended to negative scales and to
    scales restricted to a storage lattice. The codes are constant between transition scales, where
    the objective is a parabola in s: its best lattice point inside an interval is one of the two
    neighbours of the clamped vertex, so the restricted optimum is exact too.

    The sweep goes from large to small scales and stops as soon as a bound proves that no smaller
    scale can win; the result is the same. Proof, for any scale ``s' <= s`` and its ``v = s' q``:

    1. q_i lies between f_i, the level nearest to 0 on the side of w_i, and e_i, the outermost level
       on that side. Hence ``v_i b_i <= s c_i`` with ``c_i = max(0, f_i b_i, e_i b_i)``.
    2. v_i is at most ``s' rho`` away from w_i, rho being the larger of half the widest gap and
       ``|f|``, or it is clipped and shorter than w_i. Hence ``v_i b_i <= |b_i| (|w_i| + s rho)``.
    3. With the smaller of the two for every i, ``t = v'b <= T(s)``, and T grows with s.
    4. By Cauchy-Schwarz in the metric of H, ``t^2 <= v'Hv K`` with ``K = b' H^-1 b``, so the
       objective is at least ``t^2/K - 2t``, which falls until t = K. If T(s) < K, no scale up to s
       gets below ``T(s)^2/K - 2 T(s)``.

    For ``b = H w``, K is ``w'Hw``, whether H is singular or not. Any other b has no K under a
    singular H; ``K = inf`` leaves the bound ``-2 T(s)``, which needs ``v'Hv >= 0`` only.
    A free scale is not bounded by its interval, so nothing is pruned with ``clamp=False``.

    Args:
        weights: [rows, inputs]; the values that are rounded.
        hessian: Symmetric positive semi-definite H, [inputs, inputs].
        linear: b, [rows, inputs]; None stands for ``weights @ H``, where nothing but rounding
            separates the two, and the bound K costs least.
        levels: Sorted levels at scale 1, [levels].
        signed: Also search negative scales.
        lattice: Storage lattice of the scale; None allows any real number.
        clamp: Keep the scale inside the interval whose codes it produces (the published problem).
            False fits the scale freely to each interval's codes, which are stored anyway.
    """
    w, H, grid = (t.double().contiguous() for t in (weights, hessian, levels))
    b = w @ H if linear is None else linear.double().contiguous()
    limits = (signed, clamp, *lattice_limits(lattice))
    ceiling = torch.full_like(b[:, 0], -1)
    if clamp:
        ceiling = _energy(w, H, b) if linear is None else _ceiling(H, b)
    if weights.device.type != "cpu":
        form = gpu_form("sweep", weights)
        return SweepResult(*form.piso_sweep(w, H, b, grid, *limits, ceiling))
    from pipeline.kernels.cpu import sweep as compiled

    arrays = (w.numpy(), H.numpy(), b.numpy(), grid.numpy())
    scales, indices, objective, _ = compiled.piso_sweep(*arrays, *limits, ceiling.numpy())
    return SweepResult(*(torch.from_numpy(a) for a in (scales, indices, objective)))


def lattice_limits(lattice: ScaleLattice | None) -> tuple[int, int, float]:
    """Significand bits, exponent of the smallest step, largest value; those of float64 for None."""
    if lattice is None:
        return 53, -1074, float("inf")
    return lattice.significand_bits, lattice.min_step_exponent, lattice.max_value


def _energy(weights: Tensor, hessian: Tensor, product: Tensor) -> Tensor:
    """Upper bounds of ``w' H w``, [rows], which is ``b' H^-1 b`` for ``b = H w``.

    It bounds v'b without any inverse, so H may be singular. The rounding error of the sum is far
    below the second term, as ``|H_ij| <= sqrt(H_ii H_jj)``.
    """
    largest = weights.abs() @ hessian.diagonal().clamp_min(0).sqrt()
    energy = torch.linalg.vecdot(weights, product).clamp_min(0)
    return energy * (1 + CEILING_MARGIN) + ROUNDING * largest.square()


def _ceiling(hessian: Tensor, linear: Tensor) -> Tensor:
    """Upper bounds of ``b' H^-1 b``, [rows]; inf where H is numerically singular."""
    lower, info = torch.linalg.cholesky_ex(hessian)
    pivots = lower.diagonal().square()
    if int(info) != 0 or pivots.min() < SMALLEST_PIVOT * pivots.max():
        return torch.full_like(linear[:, 0], float("inf"))
    whitened = torch.linalg.solve_triangular(lower, linear.T, upper=False)
    return whitened.square().sum(0) * (1 + CEILING_MARGIN)
