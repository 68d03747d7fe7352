"""Piecewise Scale Optimization (arXiv 2606.10890) as scale rules for one block.

Single-scale blocks are solved exactly on the scale lattice by the sweep of
`pipeline.kernels.piso_sweep`. Blocks with an offset or a zero point go to `scales.affine`, blocks
with sub-scales to `scales.hierarchical`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import UnsupportedError
from pipeline.kernels import piso_sweep, piso_sweep_diagonal
from pipeline.quantization.formats import Format, zero_offset
from pipeline.quantization.scales.absmax import may_mirror
from pipeline.quantization.scales.affine import piso_affine, piso_zero_point
from pipeline.quantization.scales.base import BlockProblem, BlockScales
from pipeline.quantization.scales.hierarchical import hierarchical

Curvature = Literal["dense", "diagonal", "identity"]
"""Which part of the metric a rule looks at."""


def piso(
    problem: BlockProblem,
    fmt: Format,
    *,
    signed: bool = True,
    clamp: bool = True,
    hessian: Curvature = "dense",
) -> BlockScales:
    """Scales of one block that minimise ``v' M v - 2 v' b`` under round to nearest.

    Args:
        problem: The block.
        fmt: Format of the block.
        signed: Allow negative scales where the format does.
        clamp: Keep each scale where its codes are the nearest ones (the published problem). False
            fits it freely to the codes that some scale produces; single-scale formats only.
        hessian: What is minimised. ``dense``: M and b. ``diagonal``: ``(v - c)' diag(M) (v - c)``
            around the same minimum ``c = M^-1 b``. ``identity``: ``||v - w||^2``, without data.

    Raises:
        UnsupportedError: Unknown `hessian`.
    """
    diagonal = _diagonal(problem, hessian)
    if diagonal is not None:  # without the solver's factor, which knows the whole metric
        centred = diagonal * _centre(problem, hessian)
        problem = BlockProblem(problem.weights, diagonal.diag(), centred)
    if fmt.sub_scale is not None:
        return hierarchical(problem, fmt, signed=signed)
    signed = may_mirror(fmt, signed)
    if fmt.zero_points:
        return _zero_points(problem, fmt, clamp)
    if fmt.affine:
        return piso_affine(problem, fmt, signed=signed)
    weights, metric, linear = problem.weights, problem.metric, problem.linear
    grid, lattice = fmt.grid.to(weights.device), fmt.scale_lattice
    if diagonal is None:
        result = piso_sweep(
            weights, metric, linear, grid, signed=signed, lattice=lattice, clamp=clamp
        )
    else:
        result = piso_sweep_diagonal(
            weights, diagonal, problem.b, grid, signed=signed, lattice=lattice, clamp=clamp
        )
    scale = result.scales[:, None].to(weights.dtype)
    return BlockScales(scale, torch.zeros_like(scale), {"d": scale.float()}, result.level_indices)


def _zero_points(problem: BlockProblem, fmt: Format, clamp: bool) -> BlockScales:
    bits = (len(fmt.levels) - 1).bit_length()
    found = piso_zero_point(problem, bits, lattice=fmt.scale_lattice, clamp=clamp)
    scale = found.scales[:, None].to(problem.weights.dtype)
    offset = zero_offset(scale, found.zero_points[:, None])
    return BlockScales(scale, offset, {"d": scale.float(), "m": offset.float()}, found.codes)


def minimum(problem: BlockProblem) -> Tensor:
    """Where ``v' M v - 2 v' b`` is smallest, ``M^-1 b``, [rows, block].

    Exactly the weights where b is ``weights @ metric``.
    """
    if problem.linear is None:
        return problem.weights
    gradient = problem.linear - problem.weights @ problem.metric
    return problem.weights + torch.linalg.solve(problem.metric, gradient.T).T


def _diagonal(problem: BlockProblem, hessian: Curvature) -> Tensor | None:
    if hessian == "dense":
        return None
    if hessian == "diagonal":
        return problem.metric.diagonal()
    if hessian == "identity":
        return torch.ones_like(problem.metric.diagonal())
    raise UnsupportedError(
        f"unknown Hessian mode {hessian!r}", fix="known: dense, diagonal, identity"
    )


def _centre(problem: BlockProblem, hessian: Curvature) -> Tensor:
    return problem.weights if hessian == "identity" else minimum(problem)
