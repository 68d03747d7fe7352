"""Scales of affine grids ``v = s q + m``: float offsets, and integer zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.kernels import affine_lines, affine_offsets, piso_sweep
from pipeline.quantization.formats import FP32, Format, ScaleLattice, carrying, zero_offset
from pipeline.quantization.scales.base import BlockProblem, BlockScales

EXACT_CROSSINGS = 6000
"""Most crossings per row up to which all codes are searched (16 inputs of 8 levels have 5040)."""

SHRINKS = {3: 0.7, 4: 0.78, 8: 0.9}
"""Typical best scale, relative to the covering one, by number of levels; 1 for more."""


class _Effort(NamedTuple):
    """How much of the plane the search of large blocks looks at.

    Attributes:
        spread: Scales of the first sweeps over the offset, relative to the typical one.
        pivots: Quantiles of the weights that lines through the best pair turn about.
        thresholds: Lines along thresholds of the best pair.
        rounds: Rounds of the last two.
    """

    spread: tuple[float, ...]
    pivots: tuple[float, ...]
    thresholds: int
    rounds: int


THOROUGH = _Effort((0.7, 0.77, 0.86, 0.95, 1.05, 1.16, 1.27, 1.4), (0.1, 0.3, 0.5, 0.7, 0.9), 10, 2)
LIGHT = _Effort((0.72, 0.86, 1.0, 1.2), (0.2, 0.5, 0.8), 4, 1)
"""For more than 8 levels, where it loses 3 % of in-group loss and takes 0.4 of the time."""

SEED = _Effort((0.72, 0.86, 1.0, 1.2), (), 0, 0)
"""For pairs that are chosen anew under super-scales."""

LATTICE_STEPS = 2
"""Lattice steps of the scale that are tried on each side for fixed codes."""

ZERO_STEPS = 8
"""Likewise of a float zero point."""

_Found = tuple[Tensor, Tensor, Tensor, Tensor]
"""Scale, offset (or zero point), codes and objective of every row."""


def piso_affine(problem: BlockProblem, fmt: Format, *, signed: bool = True) -> BlockScales:
    """Scale and offset of one block that minimise ``v' M v - 2 v' b`` over codes by rounding.

    With float zero points the offset is one of them times the scale, else on the scales' lattice.

    Exact over every code vector that affine rounding of the weights (or of the minimum ``M^-1 b``,
    where that differs) reaches, with scale and offset free, where the block is small; else the best
    of sweeps along lines (`_search`). Both are then put on their lattice together (`_on_lattice`).

    Args:
        problem: One group of every row.
        fmt: Affine format.
        signed: Allow negative scales where the format does. They reach the same values with other
            offsets, which can lie closer to the lattice.
    """
    weights, M = problem.weights.double(), problem.metric.double()
    linear = problem.b.double()
    top = len(fmt.levels) - 1
    weights, codes = _rounded(weights, M, linear, top)
    signed = signed and fmt.signed_scale and fmt.scale_lattice.signed
    if fmt.zero_lattice is None:
        scale, offset, codes = _on_lattice(
            weights, M, linear, codes, top, fmt.scale_lattice, signed
        )
    else:
        scale, offset, codes = _with_zero_points(weights, M, linear, codes, fmt)
    scale, offset = (t[:, None].to(problem.weights.dtype) for t in (scale, offset))
    return BlockScales(scale, offset, {"d": scale.float(), "m": offset.float()}, codes)


def seed_codes(weights: Tensor, metric: Tensor, linear: Tensor, top: int) -> Tensor:
    """Codes of a good free scale and offset of one group, int64 [rows, inputs], quickly.

    Args:
        weights: What is rounded, [rows, inputs].
        metric: M, [inputs, inputs].
        linear: b, [rows, inputs].
        top: Largest code.
    """
    gradient = linear - weights @ metric
    centre = weights + torch.linalg.solve(metric, gradient.T).T
    return _search(centre, metric, linear, top, SEED)[1]


def _rounded(weights: Tensor, M: Tensor, linear: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """What is rounded, the weights or the minimum ``M^-1 b``, whichever is better; its codes."""
    gain, codes = _codes(weights, M, linear, top)
    gradient = linear - weights @ M
    if (gradient.abs() > 1e-9 * linear.abs().amax(1, keepdim=True)).any():
        centre = weights + torch.linalg.solve(M, gradient.T).T
        other_gain, other = _codes(centre, M, linear, top)
        nearer = (other_gain > gain)[:, None]
        weights, codes = torch.where(nearer, centre, weights), torch.where(nearer, other, codes)
    return weights, codes


def _codes(weights: Tensor, M: Tensor, linear: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Gain and codes of the search that the size of the block allows."""
    size = weights.shape[1]
    if size * (size - 1) // 2 * top * (top - 1) > EXACT_CROSSINGS:
        return _search(weights, M, linear, top, LIGHT if top >= 8 else THOROUGH)
    lines, anchors = _all_thresholds(weights, top)
    return affine_lines(weights, M, linear, top + 1, lines, anchors)


def _all_thresholds(weights: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Lines along every threshold of every input: together they touch every cell."""
    rows, size = weights.shape
    anchors = torch.arange(size, device=weights.device).repeat_interleave(top).expand(rows, -1)
    level = torch.arange(top, dtype=weights.dtype, device=weights.device).repeat(size)
    return _along_thresholds(weights, anchors, level.expand(rows, -1)), anchors


def _along_thresholds(weights: Tensor, anchors: Tensor, level: Tensor) -> Tensor:
    """Lines ``u w_i + z = level + 1/2`` from u = 0, inputs i and levels [rows, n]."""
    zero = torch.zeros_like(level)
    return torch.stack([zero, level + 0.5, zero + 1, -weights.gather(1, anchors)], dim=2)


def _offset_sweeps(weights: Tensor, u: Tensor) -> Tensor:
    """Lines of all offsets at scales ``1 / u``, [rows, n], from below the first crossing."""
    low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
    zero = torch.zeros_like(u)
    return torch.stack([u, -torch.maximum(u * low, u * high) - 1, zero, zero + 1], dim=2)


def _search(
    weights: Tensor, M: Tensor, linear: Tensor, top: int, effort: _Effort
) -> tuple[Tensor, Tensor]:
    """Good codes of large blocks: exact sweeps over the offset at several scales, then over lines
    through the best pair so far and along the thresholds nearest to it.
    """
    spread = (weights.amax(1) - weights.amin(1)).clamp_min(1e-300)
    shrink = SHRINKS.get(top + 1, 1.0) * weights.new_tensor(effort.spread)
    lines = _offset_sweeps(weights, top / (spread[:, None] * shrink))
    gain, codes = affine_lines(weights, M, linear, top + 1, lines)
    pivots = weights.quantile(weights.new_tensor(effort.pivots), dim=1).T
    for _ in range(effort.rounds):
        for through in (True, False):
            s, m = fit_offsets(codes, M, linear)
            u = torch.where(s > 0, 1 / torch.where(s > 0, s, 1.0), top / spread)[:, None]
            z = -m[:, None] * u
            anchors = None
            if through:
                zero = torch.zeros_like(pivots)
                turns = torch.stack([zero, u * pivots + z, zero + 1, -pivots], dim=2)
                lines = torch.cat([_offset_sweeps(weights, u), turns], dim=1)
            else:
                place = u * weights + z
                level = place.floor().clamp(0, top - 1)
                near = (place - level - 0.5).abs().argsort(dim=1, stable=True)
                anchors = near[:, : effort.thresholds]
                lines = _along_thresholds(weights, anchors, level.gather(1, anchors))
            found, other = affine_lines(weights, M, linear, top + 1, lines, anchors)
            codes = torch.where((found > gain)[:, None], other, codes)
            gain = torch.maximum(gain, found)
    return gain, codes


def fit_offsets(codes: Tensor, metric: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    """Best scale and offset of given codes: the 2x2 normal equations.

    Args:
        codes: [rows, inputs].
        metric: M, [inputs, inputs].
        linear: b, [rows, inputs].

    Returns:
        Scale and offset that minimise ``v' M v - 2 v' b`` for ``v = s q + m``, [rows]. The scale is
        0 where all codes are equal.
    """
    q = codes.to(metric.dtype)
    product, column = q @ metric, metric.sum(1)
    total, b = column.sum(), linear.sum(1)
    crossed = product.sum(1)
    curvature = (q * product).sum(1) - crossed * crossed / total
    slope = (q * linear).sum(1) - crossed * b / total
    usable = curvature > 1e-11 * metric.diagonal().sum()
    scale = torch.where(usable, slope / torch.where(usable, curvature, 1.0), 0.0)
    return scale, (b - scale * crossed) / total


def _on_lattice(
    weights: Tensor,
    M: Tensor,
    linear: Tensor,
    codes: Tensor,
    top: int,
    lattice: ScaleLattice,
    signed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best pair on the lattice: for the codes found, and at the nearest scales for any codes.

    For fixed codes the objective is a quadratic in two numbers, whose best lattice pair can lie
    some steps from the vertex, because the steps of scale and offset differ.
    """
    best = _best_pair(M, linear, codes, lattice, signed)
    fitted = fit_offsets(codes, M, linear)[0].clamp_min(0)
    around = torch.stack([*lattice.neighbours(fitted), best[0]], dim=1)
    if signed:
        best = _better(best, _best_pair(M, linear, top - codes, lattice, signed))
        around = torch.cat([around, -around], dim=1)
    best = _better(best, affine_offsets(weights, M, linear, top + 1, around, lattice))
    scale, offset, codes, _ = _better(best, _best_pair(M, linear, best[2], lattice, signed))
    return scale, offset, codes


def _with_zero_points(
    weights: Tensor, M: Tensor, linear: Tensor, codes: Tensor, fmt: Format
) -> tuple[Tensor, Tensor, Tensor]:
    """Best scale and float zero point: for the codes found, and for those that are best at the
    nearest scales with an offset of their own."""
    best = _best_zeros(M, linear, codes, fmt)
    fitted = fit_offsets(codes, M, linear)[0].clamp_min(0)
    around = torch.stack([*fmt.scale_lattice.neighbours(fitted), best[0]], dim=1)
    free = affine_offsets(weights, M, linear, len(fmt.levels), around, FP32)
    scale, offset, codes, _ = _better(best, _best_zeros(M, linear, free[2], fmt))
    return scale, offset, codes


def _best_zeros(M: Tensor, linear: Tensor, codes: Tensor, fmt: Format) -> _Found:
    """Best lattice scale and float zero point of fixed codes, and the objective.

    Of the zero points within `ZERO_STEPS` of the fitted one each has a best scale, the vertex of a
    parabola, of which the lattice points on both sides are tried.
    """
    lattice, zeros = fmt.scale_lattice, fmt.zero_lattice
    if zeros is None:
        raise ValueError(f"{fmt.name} has no float zero points")
    fitted, wanted = (value[:, None] for value in fit_offsets(codes, M, linear))
    fitted = carrying(fmt, fitted.clamp_min(0), wanted)
    ratio = torch.where(fitted > 0, -wanted / torch.where(fitted > 0, fitted, 1.0), 0.0)
    below, above = zeros.neighbours(ratio)
    reach = torch.arange(-ZERO_STEPS, ZERO_STEPS + 1, dtype=M.dtype, device=M.device)
    zero = zeros.round(below + reach * (above - below).clamp_min(2.0**zeros.min_step_exponent))
    q = codes.to(M.dtype)
    product, total = q @ M, M.sum()
    sides = [(q * other).sum(1, keepdim=True) for other in (product, linear)]
    crossed, b = (other.sum(1, keepdim=True) for other in (product, linear))
    curvature = sides[0] - zero * (2 * crossed - zero * total)
    slope = sides[1] - zero * b
    usable = curvature > 0
    vertex = torch.where(usable, slope / torch.where(usable, curvature, 1.0), 0.0).clamp_min(0)
    scale = torch.stack(lattice.neighbours(vertex), dim=2)
    value = scale * (scale * curvature[:, :, None] - 2 * slope[:, :, None])
    objective, at = value.reshape(len(q), -1).min(1)
    chosen = scale.reshape(len(q), -1).gather(1, at[:, None])[:, 0]
    offset = zero_offset(chosen, zero.gather(1, at[:, None] // 2)[:, 0])
    return chosen, offset, codes, objective


def _best_pair(
    M: Tensor, linear: Tensor, codes: Tensor, lattice: ScaleLattice, signed: bool
) -> _Found:
    """Best lattice scale and offset of fixed codes, and the objective: within `LATTICE_STEPS`."""
    fitted, _ = fit_offsets(codes, M, linear)
    below, above = lattice.neighbours(fitted.abs() * (1 + 2**-40))
    reach = torch.arange(-LATTICE_STEPS, LATTICE_STEPS + 1, dtype=M.dtype, device=M.device)
    scale = lattice.round(fitted[:, None] + reach * (above - below)[:, None])
    if not signed:
        scale = scale.clamp_min(0)
    q = codes.to(M.dtype)
    product, total = q @ M, M.sum()
    pull = linear.sum(1, keepdim=True) - scale * product.sum(1, keepdim=True)
    qq, qb = ((q * other).sum(1, keepdim=True) for other in (product, linear))
    offset = torch.stack(lattice.neighbours(pull / total), dim=2)
    value = (scale * (scale * qq - 2 * qb))[:, :, None] + offset * (
        offset * total - 2 * pull[:, :, None]
    )
    objective, at = value.reshape(len(q), -1).min(1)
    chosen = scale.gather(1, at[:, None] // 2)[:, 0]
    return chosen, offset.reshape(len(q), -1).gather(1, at[:, None])[:, 0], codes, objective


def _better(first: _Found, second: _Found) -> _Found:
    """Row by row the pair, codes and objective of the lower objective."""
    lower = second[3] < first[3]
    scale, offset, objective = (torch.where(lower, second[n], first[n]) for n in (0, 1, 3))
    return scale, offset, torch.where(lower[:, None], second[2], first[2]), objective


@dataclass(frozen=True)
class ZeroPointScales:
    """Scales and integer zero points of one block: ``v = s (q - z)``.

    Attributes:
        scales: On the lattice, float64 [rows].
        zero_points: int64 [rows], 0 to ``2^bits - 1``.
        codes: int64 [rows, inputs], 0 to ``2^bits - 1``.
        objective: ``v' M v - 2 v' b``, float64 [rows].
    """

    scales: Tensor
    zero_points: Tensor
    codes: Tensor
    objective: Tensor


def piso_zero_point(
    problem: BlockProblem, bits: int, *, lattice: ScaleLattice, clamp: bool = True
) -> ZeroPointScales:
    """Exact scale and integer zero point of one block, as ONNX stores unsigned codes.

    Runs the exact sweep of Piecewise Scale Optimization (arXiv 2606.10890, Algorithm 1) on the grid
    ``{-z .. 2^bits-1-z}`` for every z. Negative scales would reach nothing new: they are the
    positive ones with zero point ``2^bits-1-z``. Equal objectives go to the smaller z.

    Args:
        problem: One group of every row.
        bits: Width of codes and zero points, 1 to 8.
        lattice: Storage lattice of the scale.
        clamp: See `pipeline.kernels.piso_sweep`.

    Raises:
        InputError: `bits` is out of range.
    """
    if not 1 <= bits <= 8:
        raise InputError(
            f"zero points of {bits} bits",
            why="codes are stored in 1 to 8 bits",
            fix="use 2, 4 or 8",
        )
    best = _at_zero_point(problem, bits, 0, lattice, clamp)
    for z in range(1, 2**bits):
        best = _better(best, _at_zero_point(problem, bits, z, lattice, clamp))
    return ZeroPointScales(*best)


def _at_zero_point(
    problem: BlockProblem, bits: int, z: int, lattice: ScaleLattice, clamp: bool
) -> _Found:
    w, M, b = problem.weights, problem.metric, problem.b
    levels = torch.arange(-z, 2**bits - z, dtype=torch.float64, device=w.device)
    swept = piso_sweep(w, M, b, levels, signed=False, lattice=lattice, clamp=clamp)
    zero_point = torch.full_like(swept.level_indices[:, 0], z)
    return swept.scales, zero_point, swept.level_indices, swept.objective
