"""GPTQ as sequential rounding of any target, with scales chosen when a block is entered.

The solver is that of GPTQ (arXiv 2210.17323), equal to LDLQ and to Babai's nearest plane
(arXiv 2507.18553). The method's name depends on the target alone: the float weights give GPTQ, the
mismatch-corrected ones Qronos and CoreQ (`LayerObjective.target`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.kernels import round_columns
from pipeline.quantization.formats import Format, QuantizedTensor
from pipeline.quantization.objective import Factor
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.scales.base import BlockScales, ScaleRule

Metric = Literal["schur", "block"]

LAZY_COLUMNS = 256
"""Columns whose errors are gathered before they update everything to their right in one product."""


def solve_sequential(
    target: Tensor,
    hessian: Tensor,
    factor: Factor,
    order: ColumnOrder,
    fmt: Format,
    rule: ScaleRule,
    *,
    metric: Metric = "schur",
) -> QuantizedTensor:
    """Round a target column by column, each error compensated on the columns still to come.

    A block's scales are chosen from its compensated weights x when its first column is reached. By
    then ``(x - v)' S (x - v)`` with the Schur complement S is the block's exact share of the loss
    if the later columns stay free; the published metric is the block of H instead.

    Args:
        target: What is rounded, [out, in].
        hessian: Damped H, [in, in].
        factor: Factors of H in the order of `order.columns`.
        order: Column order that keeps the format's blocks whole.
        fmt: Format of all rows.
        rule: Scale rule, called once per block with all rows.
        metric: ``schur`` or ``block``, what the rule minimises.
    """
    width = target.shape[1]
    group, block = fmt.group_of(width), fmt.block_of(width)
    work = target[:, order.columns].float().contiguous()
    inverse_root = factor.inverse_root.float()
    levels = fmt.grid.float().to(work.device)
    indices = torch.empty(work.shape, dtype=torch.int64, device=work.device)
    chosen: list[BlockScales] = []
    stride = max(block, LAZY_COLUMNS // block * block)
    for outer in range(0, width, stride):
        end = min(outer + stride, width)
        errors = torch.empty(len(work), end - outer, device=work.device)
        for start in range(outer, end, block):
            part = slice(start, start + block)
            weights = work[:, part]
            M = _metric(metric, hessian, factor, part)
            scales = rule(weights.double(), M, weights.double() @ M, fmt)
            chosen.append(scales)
            indices[:, part], error = round_columns(
                weights,
                inverse_root[part, part],
                scales.scale.float(),
                scales.offset.float().contiguous(),
                levels,
                group,
            )
            errors[:, start - outer : start - outer + block] = error
            work[:, start + block : end] -= error @ inverse_root[part, start + block : end]
        work[:, end:] -= errors @ inverse_root[outer:end, end:]
    return _assemble(indices, chosen, order, fmt)


def _metric(metric: Metric, hessian: Tensor, factor: Factor, part: slice) -> Tensor:
    if metric == "block":
        columns = factor.columns[part]
        return hessian[columns][:, columns]
    root = factor.root[part, part]
    return root @ root.T


def _assemble(
    indices: Tensor, chosen: list[BlockScales], order: ColumnOrder, fmt: Format
) -> QuantizedTensor:
    """Put codes and scales back into storage order."""
    codes = torch.empty(indices.shape, dtype=torch.int8, device=indices.device)
    codes[:, order.columns] = (indices + fmt.code_min).to(torch.int8)
    fields = {}
    for name in chosen[0].fields:
        visited = torch.cat([scales.fields[name] for scales in chosen], dim=1)
        places = order.super_groups if name == "d" else order.groups
        stored = torch.empty_like(visited)
        stored[:, places] = visited
        fields[name] = stored
    return QuantizedTensor(fmt, codes, fields)
