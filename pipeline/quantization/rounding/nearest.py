"""Round to nearest: every block on its own, no error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.twin.common import nearest_index
from pipeline.quantization.formats import Format, QuantizedTensor
from pipeline.quantization.scales.base import BlockProblem, BlockScales, ScaleRule
from pipeline.quantization.scales.vectors import round_vectors

ROW_CHUNK = 8192
"""Rows that are handled together, which bounds memory for embeddings."""


def solve_nearest(
    target: Tensor, hessian: Tensor | None, fmt: Format, rule: ScaleRule
) -> QuantizedTensor:
    """Round each block to the nearest levels at the scale that the rule chooses for it.

    Channel-wise with the PiSO rule this is the exact optimum of the published problem; with several
    groups each sees its own block of H (the published independent variant).

    Args:
        target: What is rounded, [out, in].
        hessian: H, [in, in]; None is the identity, the data-free objective.
        fmt: Format of all rows.
        rule: Scale rule, called for every block.
    """
    parts = [_rows(rows, hessian, fmt, rule) for rows in target.split(ROW_CHUNK)]
    codes = torch.cat([part.codes for part in parts])
    names = parts[0].scales
    return QuantizedTensor(fmt, codes, {n: torch.cat([p.scales[n] for p in parts]) for n in names})


def _rows(target: Tensor, hessian: Tensor | None, fmt: Format, rule: ScaleRule) -> QuantizedTensor:
    width = target.shape[1]
    block = fmt.block_of(width)
    identity = torch.eye(block, dtype=torch.float64, device=target.device)
    codes, fields = [], []
    for start in range(0, width, block):
        part = slice(start, start + block)
        weights = target[:, part].double()
        metric = identity if hessian is None else hessian[part, part]
        scales = rule(BlockProblem(weights, metric), fmt)
        indices = scales.level_indices
        if indices is None:
            indices = nearest_codes(weights, scales, fmt)
        codes.append((indices + fmt.code_min).to(torch.int8))
        fields.append(scales.fields)
    stored = {name: torch.cat([f[name] for f in fields], dim=1) for name in fields[0]}
    return QuantizedTensor(fmt, torch.cat(codes, dim=1), stored)


def nearest_codes(weights: Tensor, scales: BlockScales, fmt: Format) -> Tensor:
    """Level indices nearest to the weights of a block at chosen scales, int64 [rows, block].

    Args:
        weights: [rows, block].
        scales: Scales of the block.
        fmt: Its format. With a codebook the nearest vectors are taken, by Euclidean distance.
    """
    group = fmt.group_of(weights.shape[1])
    if fmt.codebook is not None:
        identity = torch.eye(group, dtype=torch.float64, device=weights.device)
        parts = zip(weights.split(group, dim=1), scales.scale.unbind(1), strict=True)
        found = [round_vectors(BlockProblem(w, identity), scale, fmt) for w, scale in parts]
        return torch.cat(found, dim=1)
    scale = scales.scale.double().repeat_interleave(group, dim=1)
    offset = scales.offset.double().repeat_interleave(group, dim=1)
    # A zero scale represents nothing but the offset: every code is right, take that of level 0.
    ratio = torch.where(scale == 0, 0.0, (weights - offset) / torch.where(scale == 0, 1.0, scale))
    return nearest_index(ratio, fmt.grid.to(weights.device))
