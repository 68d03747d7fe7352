"""Data-free scales that cover the range of a group: the baseline of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantization.formats import Format
from pipeline.quantization.scales.base import BlockProblem, BlockScales


def smallest_covering_scale(weights: Tensor, levels: Tensor, *, signed: bool) -> Tensor:
    """Smallest scale at which no weight is clipped.

    Args:
        weights: [rows, inputs].
        levels: Sorted levels with a positive last one, [levels].
        signed: Take the mirrored (negative) scale where it is smaller, as llama.cpp's Q4_0 does.

    Returns:
        [rows], same dtype as `weights`.
    """
    low, high = float(levels[0]), float(levels[-1])
    top, bottom = weights.amax(1).clamp_min(0), (-weights.amin(1)).clamp_min(0)

    def covering(positive: Tensor, negative: Tensor) -> Tensor:
        if low >= 0:
            return positive / high
        return torch.maximum(positive / high, negative / -low)

    scale, mirrored = covering(top, bottom), covering(bottom, top)
    if not signed:
        return scale
    return torch.where(mirrored < scale, -mirrored, scale)


def may_mirror(fmt: Format, allowed: bool) -> bool:
    """Whether negative scales are allowed and reach anything that positive ones do not."""
    return allowed and fmt.signed_scale and fmt.levels[0] != -fmt.levels[-1]


def absmax(problem: BlockProblem, fmt: Format, *, signed: bool = True) -> BlockScales:
    """Range-covering scales of one block; min-max scale and offset for affine formats.

    Looks at the weights only.
    """
    weights = problem.weights
    lattice = fmt.scale_lattice
    if fmt.affine:
        low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
        scale, offset = lattice.round((high - low) / fmt.levels[-1]), lattice.round(low)
        return BlockScales(scale, offset, {"d": scale.float(), "m": offset.float()})
    group = fmt.group_of(weights.shape[1])
    rows = len(weights)
    scale = smallest_covering_scale(
        weights.reshape(-1, group), fmt.grid, signed=may_mirror(fmt, signed)
    ).reshape(rows, -1)
    return on_lattice(scale, fmt)


def on_lattice(scale: Tensor, fmt: Format) -> BlockScales:
    """Store wanted group scales as the format can: rounded, or as sub-scales of a super-scale.

    The super-scale is the smallest that reaches the largest group scale with a sub-scale; signs are
    arranged so that the longer end of the sub-scale range serves the largest.

    Args:
        scale: Wanted scale of each group of the block, [rows, groups].
    """
    if fmt.sub_scale is None:
        scale = fmt.scale_lattice.round(scale)
        return BlockScales(scale, scale.new_zeros(()).expand_as(scale), {"d": scale.float()})
    low, high = fmt.sub_scale
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = fmt.scale_lattice.round(largest / low)
    safe = torch.where(d == 0, 1.0, d)
    sub = torch.where(d == 0, 0.0, torch.round(scale / safe)).clamp(low, high)
    effective = d * sub
    fields = {"d": d.float(), "sc": sub.to(torch.int8)}
    return BlockScales(effective, effective.new_zeros(()).expand_as(effective), fields)
