"""Scales by turns: nearest codes, then the scale that fits them best. Fast, and close to PiSO.

For what quantizes a whole model many times over, such as learned rotations. A deploy rounds with
the other rules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.twin.common import nearest_index
from pipeline.quantization.formats import Format
from pipeline.quantization.scales.absmax import (
    affine_range,
    may_mirror,
    on_lattice,
    smallest_covering_scale,
)
from pipeline.quantization.scales.base import BlockProblem, BlockScales

STARTS = (1.0, 0.75, 0.55)
"""Shares of the range that it starts from: wide formats want all of it, narrow ones less."""

ROUNDS = 2
"""Turns from each start; codes hardly change after them."""


def alternating(problem: BlockProblem, fmt: Format, *, signed: bool = True) -> BlockScales:
    """Of a few starts the one with the smallest ``||v - w||^2`` after some turns.

    A turn never raises the error (Lloyd's iteration with levels ``s c + m``). Offsets and
    sub-scales are put on their lattice at the end only. Looks at the weights only.

    Args:
        problem: The block.
        fmt: Format of the block, without a codebook.
        signed: Also start from negative scales where the format allows them.
    """
    rows = len(problem.weights)
    weights = problem.weights.reshape(-1, fmt.group_of(problem.weights.shape[1]))
    least = torch.full_like(weights[:, 0], float("inf"))
    scale, offset = torch.zeros_like(least), torch.zeros_like(least)
    for start in STARTS:
        s, m = _covering(weights, fmt, start, signed)
        for _ in range(ROUNDS):
            s, m = _fitted(weights, s, m, fmt)
        error = (weights - _values(weights, s, m, fmt)[1]).square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        scale, offset = torch.where(better, s, scale), torch.where(better, m, offset)
    wanted = offset.reshape(rows, -1) if fmt.affine else None
    return on_lattice(scale.reshape(rows, -1), fmt, wanted)


def _covering(weights: Tensor, fmt: Format, share: float, signed: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset that cover a share of each row's range, each [rows]."""
    if not fmt.affine:
        scale = smallest_covering_scale(weights, fmt.grid, signed=may_mirror(fmt, signed))
        return share * scale, torch.zeros_like(scale)
    low, high = affine_range(weights, fmt)
    middle, reach = (low + high) / 2, share * (high - low) / 2
    return 2 * reach / fmt.levels[-1], middle - reach


def _values(weights: Tensor, scale: Tensor, offset: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Nearest levels, and the values that they stand for, each [rows, inputs]."""
    s, m = scale[:, None], offset[:, None]
    grid = fmt.grid.to(weights)
    ratio = torch.where(s == 0, 0.0, (weights - m) / torch.where(s == 0, 1.0, s))
    if fmt.levels == tuple(fmt.levels[0] + n for n in range(len(fmt.levels))):
        levels = (ratio + 0.5).floor().clamp(fmt.levels[0], fmt.levels[-1])  # much faster
    else:
        levels = grid[nearest_index(ratio, grid)]
    return levels, levels * s + m


def _fitted(weights: Tensor, scale: Tensor, offset: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """The least-squares scale (and offset) for the nearest codes; the old ones where none is.

    A zero point stays what it is, in codes.
    """
    c, _ = _values(weights, scale, offset, fmt)
    w, zero = weights, torch.zeros_like(offset)
    if fmt.zero_points:
        zero = torch.where(scale == 0, 0.0, offset / torch.where(scale == 0, 1.0, scale))
        c = c + zero[:, None]
    elif fmt.affine:
        w = w - w.mean(1, keepdim=True)
        c, middle = c - c.mean(1, keepdim=True), c.mean(1)
    energy = c.square().sum(1)
    fitted = torch.where(energy > 0, (w * c).sum(1) / energy.clamp_min(1e-300), scale)
    if fmt.affine and not fmt.zero_points:
        return fitted, torch.where(energy > 0, weights.mean(1) - fitted * middle, offset)
    return fitted, fitted * zero
