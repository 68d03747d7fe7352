"""Coordinate descent on the codes of one block, with its scales fixed or left free."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.device import gpu_form
from pipeline.kernels.sweep import SweepResult
from pipeline.quantization.formats import ScaleLattice


def descend(
    indices: Tensor,
    scales: Tensor,
    offsets: Tensor,
    residual: Tensor,
    metric: Tensor,
    levels: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """One cyclic pass of coordinate descent over a block of columns, scales fixed.

    Each column in turn takes the level that is best with all others held (QuantEase,
    arXiv 2309.01885). No move raises ``v'Hv - 2 v'b``.

    Args:
        indices: Level indices, int64 [rows, block]. Not modified.
        scales: [rows, block // group_size]; where 0, codes stay.
        offsets: [rows, block // group_size].
        residual: ``b - H v`` on the block, v over all columns, [rows, block].
        metric: The block of H on its diagonal, [block, block].
        levels: Sorted levels at scale 1, [levels].
        group_size: Columns per scale.

    Returns:
        New indices, and the change of v, [rows, block], that updates the residual of all columns by
        ``-delta @ H[block, :]``.
    """
    dtype = residual.dtype
    s, m, r, H, grid = (
        t.to(dtype).contiguous() for t in (scales, offsets, residual, metric, levels)
    )
    if residual.device.type != "cpu":
        form = gpu_form("descent", residual)
        return form.descend(indices.contiguous(), s, m, r, H, grid, group_size)
    from pipeline.kernels.cpu import descent as compiled

    arrays = (t.numpy() for t in (indices.contiguous(), s, m, r, H, grid))
    found, delta = compiled.descend(*arrays, group_size)
    return torch.from_numpy(found), torch.from_numpy(delta)


def fit_free(
    indices: Tensor,
    linear: Tensor,
    metric: Tensor,
    levels: Tensor,
    *,
    sweeps: int,
    signed: bool,
    lattice: ScaleLattice,
) -> SweepResult:
    """Coordinate moves on the codes of one group while its scale is always the best one.

    With the scale eliminated, ``s^2 q'Mq - 2 s q'c`` is ``-(q'c)^2 / q'Mq``; each code in turn
    takes the level that is best for that (Beacon, arXiv 2508.20293, with a metric and a linear
    term). The scale is put on the lattice at the end.

    Args:
        indices: Level indices to start from, int64 [rows, group]. Not modified.
        linear: c, [rows, group].
        metric: M, symmetric positive definite, [group, group].
        levels: Sorted levels at scale 1, [levels].
        sweeps: Most passes over the group; it stops when none moves a code.
        signed: Allow negative scales.
        lattice: Storage lattice of the scale.

    Returns:
        Scales, indices and objective; the caller compares the last with what it has, since putting
        the scale on the lattice can cost more than the moves gained.
    """
    q = indices.contiguous()
    c, M, grid = (t.double().contiguous() for t in (linear, metric, levels))
    limits = (lattice.significand_bits, lattice.min_step_exponent, lattice.max_value)
    if linear.device.type != "cpu":
        form = gpu_form("descent", linear)
        return SweepResult(*form.fit_free(q, c, M, grid, sweeps, *limits, signed))
    from pipeline.kernels.cpu import descent as compiled

    arrays = (q.numpy(), c.numpy(), M.numpy(), grid.numpy())
    out = compiled.fit_free(*arrays, sweeps, *limits, signed)
    return SweepResult(*(torch.from_numpy(a) for a in out))
