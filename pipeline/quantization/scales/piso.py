"""Piecewise Scale Optimization (arXiv 2606.10890) as scale rules for one block.

Single-scale blocks are solved exactly on the scale lattice by the sweep of
`pipeline.kernels.piso_sweep`. Blocks with an offset are solved by alternation from several starts,
blocks with sub-scales group by group followed by rounding onto the super-scale's lattice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels import fit_affine, piso_sweep
from pipeline.quantization.formats import Format
from pipeline.quantization.scales.absmax import may_mirror, on_lattice
from pipeline.quantization.scales.base import BlockScales

AFFINE_STARTS = tuple((shrink, p) for shrink in (1.0, 0.9, 0.8, 0.65) for p in (0.0, 0.5, 1.0))
AFFINE_ITERATIONS = 8


def piso(
    weights: Tensor, metric: Tensor, linear: Tensor, fmt: Format, *, signed: bool = True
) -> BlockScales:
    """Scales of one block that minimise ``v' M v - 2 v' b`` under round to nearest.

    Args:
        weights: Values that are rounded, [rows, block].
        metric: M, [block, block].
        linear: b, [rows, block].
        fmt: Format of the block.
        signed: Allow negative scales where the format does.
    """
    signed = may_mirror(fmt, signed)
    if fmt.affine:
        return _affine(weights, metric, linear, fmt)
    if fmt.sub_scale is not None:
        return _hierarchical(weights, metric, linear, fmt, signed)
    grid = fmt.grid.to(weights.device)
    result = piso_sweep(weights, metric, linear, grid, signed=signed, lattice=fmt.scale_lattice)
    scale = result.scales[:, None].to(weights.dtype)
    return BlockScales(scale, torch.zeros_like(scale), {"d": scale.float()}, result.level_indices)


def _affine(weights: Tensor, metric: Tensor, linear: Tensor, fmt: Format) -> BlockScales:
    """Alternation for ``v = s q + m``; the offset is refitted once the scale is on its lattice."""
    starts = torch.tensor(AFFINE_STARTS, dtype=torch.float64, device=weights.device)
    M = metric.double()
    centre = torch.linalg.solve(M, linear.double().T).T
    scale, _, codes, _ = fit_affine(centre, M, len(fmt.levels), starts, AFFINE_ITERATIONS)
    scale = fmt.scale_lattice.round(scale)[:, None]
    residual = (centre - scale * codes) @ M
    offset = fmt.scale_lattice.round(residual.sum(1, keepdim=True) / M.sum())
    scale, offset = scale.to(weights.dtype), offset.to(weights.dtype)
    return BlockScales(scale, offset, {"d": scale.float(), "m": offset.float()}, codes)


def _hierarchical(
    weights: Tensor, metric: Tensor, linear: Tensor, fmt: Format, signed: bool
) -> BlockScales:
    """Each group on its own block of the metric, then sub-scales under a common super-scale."""
    group = fmt.group_size
    grid = fmt.grid.to(weights.device)
    gradient = linear - weights @ metric
    wanted = []
    for start in range(0, weights.shape[1], group):
        part = slice(start, start + group)
        block = metric[part, part]
        # The other groups are taken as unquantized, so their share of the gradient drops out.
        share = gradient[:, part] + weights[:, part] @ block
        wanted.append(piso_sweep(weights[:, part], block, share, grid, signed=signed).scales)
    return on_lattice(torch.stack(wanted, dim=1).to(weights.dtype), fmt)
