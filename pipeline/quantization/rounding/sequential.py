"""GPTQ as sequential rounding of any target, with scales chosen when a block is entered.

The solver is that of GPTQ (arXiv 2210.17323), equal to LDLQ and to Babai's nearest plane
(arXiv 2507.18553). The method's name depends on the target: the float weights give GPTQ, the
mismatch-corrected ones CoreQ (`LayerObjective.target`) and Qronos (`rounding.qronos`). GPTAQ leaves
the target alone and lets every column carry its mismatch on while it is rounded (`drift`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pipeline.kernels import round_columns
from pipeline.quantization.formats import SUPER_FIELDS, Format, QuantizedTensor
from pipeline.quantization.objective import Factor
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.scales.base import BlockProblem, BlockScales, ScaleRule
from pipeline.quantization.scales.hierarchical import choose_sub_scales
from pipeline.quantization.scales.vectors import round_vectors

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
    drift: Tensor | None = None,
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
        drift: Strictly upper triangular P in solver order, [in, in]: once column i is rounded, the
            columns j to come also receive ``w_i P_ij``, w_i being its compensated weight before
            rounding (`gptaq_drift`). None is the plain solver.
    """
    width = target.shape[1]
    group, block = fmt.group_of(width), fmt.block_of(width)
    work = target[:, order.columns].float().contiguous()
    inverse_root = factor.inverse_root.float()
    P = None if drift is None else drift.float()
    levels = fmt.grid.float().to(work.device)
    indices = torch.empty(work.shape, dtype=torch.int64, device=work.device)
    chosen: list[BlockScales] = []
    stride = max(block, LAZY_COLUMNS // block * block)
    for outer in range(0, width, stride):
        gathered = slice(outer, min(outer + stride, width))
        errors = torch.empty(len(work), gathered.stop - outer, device=work.device)
        reached = errors if P is None else torch.empty_like(errors)
        for start in range(outer, gathered.stop, block):
            part, here = (slice(a, a + block) for a in (start, start - outer))
            scales, indices[:, part], errors[:, here] = _enter_block(
                work[:, part], hessian, factor, part, fmt, rule, metric, P
            )
            chosen.append(scales)
            if P is not None:
                values = values_of(indices[:, part], scales, levels, group)
                reached[:, here] = values + errors[:, here] * inverse_root.diagonal()[part]
            later = slice(part.stop, gathered.stop)
            _spread(work, part, later, errors[:, here], inverse_root, reached[:, here], P)
        _spread(work, gathered, slice(gathered.stop, width), errors, inverse_root, reached, P)
    return assemble(indices, chosen, order, fmt)


def _enter_block(
    weights: Tensor,
    hessian: Tensor,
    factor: Factor,
    part: slice,
    fmt: Format,
    rule: ScaleRule,
    metric: Metric,
    drift: Tensor | None,
) -> tuple[BlockScales, Tensor, Tensor]:
    """Scales, level indices and errors of one block, from its compensated weights."""
    scales = rule(_problem(weights, hessian, factor, part, metric), fmt)
    if (scales.revisable or fmt.codebook is not None) and drift is None:
        return _round_revising(weights, hessian, factor, part, scales, fmt, metric)
    root, levels = factor.inverse_root[part, part].float(), fmt.grid.float().to(weights.device)
    own = None if drift is None else drift[part, part]
    return scales, *round_block(weights, root, scales, levels, fmt.group_of(len(root)), own)


def _round_revising(
    weights: Tensor,
    hessian: Tensor,
    factor: Factor,
    part: slice,
    scales: BlockScales,
    fmt: Format,
    metric: Metric,
) -> tuple[BlockScales, Tensor, Tensor]:
    """Round a super-group group by group; each chooses its sub-scales as it is entered.

    Args:
        weights: Compensated weights of the super-group, float32 [rows, block].
        hessian: Damped H, [in, in].
        factor: Factors of H in solver order.
        part: Columns of the super-group in solver order.
        scales: What the rule chose at its entry.
        fmt: Format with sub-scales.
        metric: What the choice minimises.

    Returns:
        Scales, level indices and errors of the super-group.
    """
    work, size = weights.clone(), fmt.group_size
    root = factor.inverse_root[part, part].float()
    levels = fmt.grid.float().to(work.device)
    indices = torch.empty(work.shape, dtype=torch.int64, device=work.device)
    errors = torch.empty_like(work)
    for g, start in enumerate(range(0, work.shape[1], size)):
        own, later = slice(start, start + size), slice(start + size, work.shape[1])
        placed = slice(part.start + own.start, part.start + own.stop)
        problem = _problem(work[:, own], hessian, factor, placed, metric)
        together = None
        if scales.revisable:
            scales, together = choose_sub_scales(problem, scales, g, fmt)
        one = replace(scales, scale=scales.scale[:, g : g + 1], offset=scales.offset[:, g : g + 1])
        if fmt.codebook is not None and (together is None or metric != "schur"):
            exact = _problem(work[:, own], hessian, factor, placed, "schur")
            together = round_vectors(exact, one.scale[:, 0], fmt)
        indices[:, own], errors[:, own] = _better_codes(
            work[:, own], root[own, own], one, together, levels, alone=fmt.codebook is None
        )
        work[:, later] -= errors[:, own] @ root[own, later]
    return scales, indices, errors


def _better_codes(
    weights: Tensor,
    root: Tensor,
    scales: BlockScales,
    together: Tensor,
    levels: Tensor,
    *,
    alone: bool,
) -> tuple[Tensor, Tensor]:
    """Of codes rounded in sequence and codes found together, in each row those of lower loss.

    The loss of a group whose later columns are free is the sum of its squared errors
    ``(x - v) U^-1``, however its codes were found. Those of codebooks cannot be rounded `alone`.
    """
    size = weights.shape[1]
    difference = weights - values_of(together, scales, levels, size)
    others = torch.linalg.solve_triangular(root, difference, upper=True, left=False)
    if not alone:
        return together, others
    indices, errors = round_block(weights, root, scales, levels, size)
    better = (others.square().sum(1) < errors.square().sum(1))[:, None]
    return torch.where(better, together, indices), torch.where(better, others, errors)


def _problem(
    weights: Tensor, hessian: Tensor, factor: Factor, part: slice, metric: Metric
) -> BlockProblem:
    if metric == "block":
        columns = factor.columns[part]
        M = hessian[columns][:, columns]
    else:
        root = factor.root[part, part]
        M = root @ root.T
    return BlockProblem(weights.double(), M, inverse_root=factor.inverse_root[part, part])


def _spread(
    work: Tensor,
    part: slice,
    later: slice,
    errors: Tensor,
    inverse_root: Tensor,
    reached: Tensor,
    drift: Tensor | None,
) -> None:
    """Update later columns for the errors of a rounded part and for what it reached before."""
    work[:, later] -= errors @ inverse_root[part, later]
    if drift is not None:
        work[:, later] += reached @ drift[part, later]


def round_block(
    weights: Tensor,
    factor: Tensor,
    scales: BlockScales,
    levels: Tensor,
    group: int,
    drift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Level indices and errors of one block at chosen scales, see `pipeline.kernels.round_columns`.

    Args:
        weights: Compensated weights of the block, float32 [rows, block].
        factor: Upper triangular factor of the block, float32 [block, block].
        scales: Scales of the block.
        levels: Levels at scale 1, float32 [levels].
        group: Columns per scale.
        drift: Drift inside the block, float32 [block, block], or None.
    """
    scale, offset = scales.scale.float(), scales.offset.float().contiguous()
    return round_columns(weights, factor, scale, offset, levels, group, drift)


def values_of(indices: Tensor, scales: BlockScales, levels: Tensor, group: int) -> Tensor:
    """Weights that a block's codes stand for, in the dtype of the levels, [rows, block].

    Args:
        indices: Level indices, int64 [rows, block].
        scales: Scales of the block.
        levels: Levels at scale 1, [levels].
        group: Columns per scale.
    """
    scale, offset = (
        part.to(levels.dtype).repeat_interleave(group, dim=1)
        for part in (scales.scale, scales.offset)
    )
    return scale * levels[indices] + offset


def assemble(
    indices: Tensor, chosen: list[BlockScales], order: ColumnOrder, fmt: Format
) -> QuantizedTensor:
    """Put codes and scales back into storage order.

    Args:
        indices: Level indices in solver order, int64 [out, in].
        chosen: Scales of each block in the order in which they were chosen.
        order: The column order that was followed.
        fmt: Format of all rows.
    """
    codes = torch.empty(indices.shape, dtype=torch.int8, device=indices.device)
    codes[:, order.columns] = (indices + fmt.code_min).to(torch.int8)
    fields = {}
    for name in chosen[0].fields:
        visited = torch.cat([scales.fields[name] for scales in chosen], dim=1)
        places = order.super_groups if name in SUPER_FIELDS else order.groups
        stored = torch.empty_like(visited)
        stored[:, places] = visited
        fields[name] = stored
    return QuantizedTensor(fmt, codes, fields)
