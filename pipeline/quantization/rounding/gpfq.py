"""GPFQ: greedy path following, each column rounded against the error of the columns before it."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantization.formats import Format, QuantizedTensor
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.rounding.sequential import assemble, round_block, values_of
from pipeline.quantization.scales.base import BlockProblem, BlockScales, ScaleRule


def solve_gpfq(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor | None,
    order: ColumnOrder,
    fmt: Format,
    rule: ScaleRule,
) -> QuantizedTensor:
    """Round a column so that it cancels as much of the error so far as it can alone.

    With ``u = sum_(j<t) (x_j w_j - xq_j v_j)`` column t rounds ``xq_t' (u + x_t w_t) / |xq_t|^2``;
    columns to come keep their float weights (GPFQ, arXiv 2201.11113, in the memory-efficient form
    that needs H and G only). A block's scales are chosen, when it is reached, for the loss
    ``||u + x w - xq v||^2`` of its own columns.

    Args:
        weight: Float weights, [out, in].
        hessian: Damped H, [in, in].
        cross: ``G = Xq' X`` with the same damping, [in, in]; None for symmetric calibration.
        order: Column order that keeps the format's blocks whole.
        fmt: Format of all rows.
        rule: Scale rule, called once per block with all rows.
    """
    width = weight.shape[1]
    group, block = fmt.group_of(width), fmt.block_of(width)
    columns = order.columns
    H = hessian.double()[columns][:, columns]
    G = H if cross is None else cross.double()[columns][:, columns]
    W = weight.double()[:, columns]
    levels = fmt.grid.float().to(W.device)
    # Xq' u, exact up to the block that is being entered.
    pull = torch.zeros_like(W)
    indices = torch.empty(W.shape, dtype=torch.int64, device=W.device)
    chosen: list[BlockScales] = []
    for start in range(0, width, block):
        part, later = slice(start, start + block), slice(start + block, width)
        w, h, g = W[:, part], H[part, part], G[part, part]
        aim = (pull[:, part] + w * g.diagonal()) / h.diagonal()
        scales = rule(BlockProblem(aim, h, pull[:, part] + w @ g.T), fmt)
        chosen.append(scales)
        # Rounded columns act on later ones by their value v = (v + error) - error: the weight
        # before rounding by the drift, its error by the factor, whose diagonal is therefore one.
        drift = -(h / h.diagonal()).triu(1)
        work = (pull[:, part] + w @ g.tril().T) / h.diagonal()
        factor = torch.eye(len(h), dtype=h.dtype, device=h.device) + drift
        indices[:, part], _ = round_block(
            work.float(), factor.float(), scales, levels, group, drift.float()
        )
        values = values_of(indices[:, part], scales, levels, group).double()
        pull[:, later] += w @ G[later, part].T - values @ H[part, later]
    return assemble(indices, chosen, order, fmt)
