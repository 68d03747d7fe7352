"""Sequential rounding with error feedback inside one block of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.device import gpu_form


def round_columns(
    weights: Tensor,
    factor: Tensor,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor,
    group_size: int,
    drift: Tensor | None = None,
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
        drift: Strictly upper triangular P, [columns, columns]: once column i is rounded, column j
            also receives ``w_i P_ij``, where w_i is its compensated weight before rounding. None
            changes nothing (GPTQ); GPTAQ passes the input mismatch (arXiv 2504.02692).

    Returns:
        Level indices, int64 [rows, columns], and errors ``(w - v) / U_ii``, [rows, columns], which
        update the columns after the block by ``-errors @ factor_right_of_the_block``. The weights
        before rounding, which a drift carries further, are ``v + errors * factor.diagonal()``.
    """
    w, U = weights.contiguous(), factor.contiguous()
    s, m, grid = scales.contiguous(), offsets.contiguous(), levels.to(weights.dtype)
    P = None if drift is None else drift.to(weights.dtype).contiguous()
    if weights.device.type != "cpu":
        form = gpu_form("columns", weights)
        return form.round_columns(w, U, s, m, grid, group_size, P)
    from pipeline.kernels.cpu import columns as compiled

    arrays = (w.numpy(), U.numpy(), s.numpy(), m.numpy(), grid.numpy())
    carried = None if P is None else P.numpy()
    indices, errors = compiled.round_columns(*arrays, group_size, carried)
    return torch.from_numpy(indices), torch.from_numpy(errors)
