"""Data-free scales that cover the range of a group: the baseline of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantization.formats import Format, ScaleLattice, stored_pair
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
    rows = len(weights)
    grouped = weights.reshape(-1, fmt.group_of(weights.shape[1]))
    if fmt.affine:
        low, high = affine_range(grouped, fmt)
        scale = ((high - low) / fmt.levels[-1]).reshape(rows, -1)
        return on_lattice(scale, fmt, low.reshape(rows, -1))
    scale = smallest_covering_scale(grouped, fmt.grid, signed=may_mirror(fmt, signed))
    return on_lattice(scale.reshape(rows, -1), fmt)


def affine_range(weights: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each row of [rows, inputs]; with zero points, and 0, which is
    then one of the values."""
    low, high = weights.amin(1), weights.amax(1)
    return (low.clamp_max(0), high.clamp_min(0)) if fmt.zero_points else (low, high)


def on_lattice(scale: Tensor, fmt: Format, offset: Tensor | None = None) -> BlockScales:
    """Store wanted group scales and offsets as the format can.

    They are rounded, or become integers under super-values: the smallest ones that reach the
    largest wanted value with an integer; signs are arranged so that the longer end of the integers'
    range serves the largest.

    Args:
        scale: Wanted scale of each group of the block, [rows, groups].
        fmt: Format of the block.
        offset: Wanted offset of each group, same shape; for affine formats.
    """
    lattice = fmt.scale_lattice
    zero = torch.zeros_like(scale)
    if fmt.sub_scale is None:
        if offset is None:
            scale = lattice.round(scale)
            return BlockScales(scale, zero, {"d": scale.float()})
        scale, offset = stored_pair(fmt, scale, offset)
        return BlockScales(scale, offset, {"d": scale.float(), "m": offset.float()})
    d, sc = _under_super(scale, fmt.sub_scale, lattice, fmt.sub_step)
    fields = {"d": d.float(), "sc": sc.to(torch.int8)}
    if offset is None or fmt.sub_offset is None:
        return BlockScales(d * sc, zero, fields)
    dmin, mn = _under_super(-offset, fmt.sub_offset, lattice)
    fields |= {"dmin": dmin.float(), "mn": mn.to(torch.int8)}
    return BlockScales(d * sc, -dmin * mn, fields)


def _under_super(
    wanted: Tensor, limits: tuple[int, int], lattice: ScaleLattice, step: int = 1
) -> tuple[Tensor, Tensor]:
    """Super-value [rows, 1] and integers [rows, groups] of wanted values."""
    low, high = limits
    largest = wanted.gather(1, wanted.abs().argmax(1, keepdim=True))
    unit = lattice.round(largest / (low if -low > high else high))
    integers = nearest_integers(wanted / torch.where(unit == 0, 1.0, unit), limits, step)
    return unit, torch.where(unit == 0, max(0, low), integers)


def nearest_integers(values: Tensor, limits: tuple[int, int], step: int = 1) -> Tensor:
    """Of the integers from the lower limit on in such steps the nearest, in the values' dtype."""
    low, high = limits
    if step == 1:
        return torch.round(values).clamp(low, high)
    return (torch.round((values - low) / step) * step + low).clamp(low, high)
