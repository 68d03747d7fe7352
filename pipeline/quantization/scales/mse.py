"""Data-free grid search over shrunken ranges, the usual way to choose scales."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.twin.common import nearest_index
from pipeline.quantization.formats import Format, stored_pair
from pipeline.quantization.scales.absmax import (
    affine_range,
    may_mirror,
    on_lattice,
    smallest_covering_scale,
)
from pipeline.quantization.scales.base import BlockProblem, BlockScales

SHRINK_STEPS = 100
"""The factors 1, 0.99, .. 0.01 of the range are tried."""

CHUNK_VALUES = 1 << 20
"""Rounded values that are held at a time, which bounds memory."""


def mse(problem: BlockProblem, fmt: Format, *, signed: bool = True) -> BlockScales:
    """Of 100 shrunken covering scales the one with the smallest ``||v - w||^2``.

    The search of GPTQ's reference code (arXiv 2210.17323) with the exponent 2 and factors down to
    0.01; with offsets both ends of the range shrink. A candidate is rounded to the scale lattice
    before it is judged. Looks at the weights only.

    Args:
        problem: The block.
        fmt: Format of the block.
        signed: Also try as many negative scales where the format allows them.
    """
    group = fmt.group_of(problem.weights.shape[1])
    weights = problem.weights.reshape(-1, group)
    starts = _ranges(weights, fmt, may_mirror(fmt, signed))
    scale, offset = _search(weights, starts, fmt)
    rows = len(problem.weights)
    scale, offset = scale.reshape(rows, -1), offset.reshape(rows, -1)
    return on_lattice(scale, fmt, offset if fmt.affine else None)


def _ranges(weights: Tensor, fmt: Format, mirror: bool) -> list[tuple[Tensor, Tensor]]:
    """Scales and offsets that cover every weight, each [rows]; the mirrored pair comes second."""
    if fmt.affine:
        low, high = affine_range(weights, fmt)
        return [((high - low) / fmt.levels[-1], low)]
    zero = torch.zeros_like(weights[:, 0])
    ranges = [(smallest_covering_scale(weights, fmt.grid, signed=False), zero)]
    if mirror:
        ranges.append((-smallest_covering_scale(-weights, fmt.grid, signed=False), zero))
    return ranges


def _search(
    weights: Tensor, ranges: list[tuple[Tensor, Tensor]], fmt: Format
) -> tuple[Tensor, Tensor]:
    """Scale and offset with the smallest squared error, each [rows]; the earliest of equal ones."""
    factors = 1 - torch.arange(SHRINK_STEPS).to(weights) / SHRINK_STEPS
    scales, offsets = (
        torch.cat([start[:, None] * factors for start in column], dim=1)
        for column in zip(*ranges, strict=True)
    )
    scales, offsets = stored_pair(fmt, scales, offsets)
    together = max(1, CHUNK_VALUES // max(1, weights.numel()))
    errors = [
        _squared_error(weights, s, m, fmt)
        for s, m in zip(scales.split(together, 1), offsets.split(together, 1), strict=True)
    ]
    best = torch.cat(errors, dim=1).argmin(1, keepdim=True)
    return scales.gather(1, best)[:, 0], offsets.gather(1, best)[:, 0]


def _squared_error(weights: Tensor, scales: Tensor, offsets: Tensor, fmt: Format) -> Tensor:
    """``||v - w||^2`` of weights [rows, inputs] at all of their candidates, [rows, candidates]."""
    levels = fmt.grid.to(weights)
    w, s, m = weights[:, None], scales[:, :, None], offsets[:, :, None]
    ratio = torch.where(s == 0, 0.0, (w - m) / torch.where(s == 0, 1.0, s))
    return (s * levels[nearest_index(ratio, levels)] + m - w).square().sum(2)
