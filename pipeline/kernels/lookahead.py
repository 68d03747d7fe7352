"""The loss that sequential rounding of one block ends with, for many candidate scales."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.twin import lookahead as twin


def sequential_loss(
    weights: Tensor,
    factor: Tensor,
    scales: Tensor,
    levels: Tensor,
    offsets: Tensor | None = None,
) -> Tensor:
    """Loss of every row under each of its candidate scales, errors fed back inside the block.

    The recursion of `round_columns` in float64. Its loss ``sum_i ((x_i - v_i) / U_ii)^2`` is the
    exact share of the block, ``(x - v)' (U'U)^-1 (x - v)``, if all later columns stay free
    (GPTQ, arXiv 2210.17323, as Babai's nearest plane, arXiv 2507.18553).

    Args:
        weights: Compensated weights x of one group, [rows, columns].
        factor: Upper triangular U of the group, ``H^-1 = U'U``, [columns, columns].
        scales: Candidates, [rows, n]; a scale of 0 gives ``v = offset``.
        levels: Sorted levels at scale 1, [levels].
        offsets: Offset of each candidate, [rows, n]; None is zeros.

    Returns:
        float64 [rows, n].
    """
    x, U, s, grid = (t.double().contiguous() for t in (weights, factor, scales, levels))
    m = torch.zeros_like(s) if offsets is None else offsets.double().contiguous()
    if weights.device.type != "cpu":
        return twin.sequential_loss(x, U, s, m, grid)
    from pipeline.kernels.cpu import lookahead as compiled

    arrays = (t.numpy() for t in (x, U, s, m, grid))
    return torch.from_numpy(compiled.sequential_loss(*arrays))
