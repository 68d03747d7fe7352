"""Hot loops. Each has a compiled form and a plain PyTorch twin that must agree with it.

The device is chosen by where the tensors are: Numba on the CPU, the twin elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels import twin
from pipeline.quantization.formats import ScaleLattice

__all__ = ["SweepResult", "fit_affine", "piso_sweep", "round_columns"]


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
    linear: Tensor,
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

    Args:
        weights: [rows, inputs]; the values that are rounded.
        hessian: Symmetric positive semi-definite H, [inputs, inputs].
        linear: b, [rows, inputs] (``weights @ H`` when nothing but rounding separates the two).
        levels: Sorted levels at scale 1, [levels].
        signed: Also search negative scales.
        lattice: Storage lattice of the scale; None allows any real number.
        clamp: Keep the scale inside the interval whose codes it produces (the published problem).
            False fits the scale freely to each interval's codes, which are stored anyway.
    """
    w, H, b, grid = (t.double().contiguous() for t in (weights, hessian, linear, levels))
    bits, exponent, largest = (
        (53, -1074, float("inf"))
        if lattice is None
        else (lattice.significand_bits, lattice.min_step_exponent, lattice.max_value)
    )
    if weights.device.type != "cpu":
        return SweepResult(*twin.piso_sweep(w, H, b, grid, signed, clamp, bits, exponent, largest))
    from pipeline.kernels import compiled

    arrays = (w.numpy(), H.numpy(), b.numpy(), grid.numpy())
    out = compiled.piso_sweep(*arrays, signed, clamp, bits, exponent, largest)
    return SweepResult(*(torch.from_numpy(a) for a in out))


def round_columns(
    weights: Tensor,
    factor: Tensor,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Round a block's columns in order, each error spread onto the block's later columns.

    The inner loop of GPTQ (arXiv 2210.17323, Algorithm 1) on one block.

    Args:
        weights: Compensated weights of the block, [rows, columns]. Not modified.
        factor: The block of the upper Cholesky factor of the inverse Hessian, [columns, columns].
        scales: [rows, columns // group_size].
        offsets: [rows, columns // group_size]; zeros for formats without offsets.
        levels: Sorted levels at scale 1, [levels].
        group_size: Columns per scale.

    Returns:
        Level indices, int64 [rows, columns], and errors ``(w - v) / U_ii``, [rows, columns], which
        update the columns after the block by ``-errors @ factor_right_of_the_block``.
    """
    w, U = weights.contiguous(), factor.contiguous()
    s, m, grid = scales.contiguous(), offsets.contiguous(), levels.to(weights.dtype)
    if weights.device.type != "cpu":
        return twin.round_columns(w, U, s, m, grid, group_size)
    from pipeline.kernels import compiled

    arrays = (w.numpy(), U.numpy(), s.numpy(), m.numpy(), grid.numpy())
    indices, errors = compiled.round_columns(*arrays, group_size)
    return torch.from_numpy(indices), torch.from_numpy(errors)


def fit_affine(
    weights: Tensor, hessian: Tensor, levels: int, starts: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and offset of each row by alternation from several starts.

    From each start: round to nearest, then solve the 2x2 normal equations for scale and offset,
    while the objective ``(w - v)' H (w - v)`` decreases. A local method; the best start wins.

    Args:
        weights: [rows, inputs].
        hessian: [inputs, inputs].
        levels: Number of integer levels, ``0 .. levels-1``.
        starts: Pairs (shrink, position), [starts, 2]: the start covers the fraction `shrink` of the
            row's range, at the relative position `position` in what is left.
        iterations: Most alternations per start.

    Returns:
        scale, offset, float64 [rows]; the codes that they were fitted to, int64 [rows, inputs]; the
        objective of all three, float64 [rows].
    """
    w, H = weights.double().contiguous(), hessian.double().contiguous()
    s = starts.double().to(weights.device).contiguous()
    if weights.device.type != "cpu":
        return twin.fit_affine(w, H, levels, s, iterations)
    from pipeline.kernels import compiled

    out = compiled.fit_affine(w.numpy(), H.numpy(), levels, s.numpy(), iterations)
    scale, offset, codes, objective = (torch.from_numpy(a) for a in out)
    return scale, offset, codes, objective
