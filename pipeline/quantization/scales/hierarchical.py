"""Scales of super-groups on their own lattice: integers under fp16 super-scales (K-quants).

``v = d sc level - dmin mn``, with one ``sc`` (and ``mn``) a group and one ``d`` (and ``dmin``) a
super-group. At the entry of a super-group the rule fits every group by itself, finds the
super-scales under which the rounded sub-scales lose least, and then chooses the integers anew. The
sequential solver calls `choose_sub_scales` again as it enters each group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.kernels import fit_sub_scales, piso_sweep
from pipeline.quantization.formats import Format, ScaleLattice, group_offsets, group_scales
from pipeline.quantization.scales.absmax import may_mirror, nearest_integers
from pipeline.quantization.scales.affine import fit_offsets, seed_codes
from pipeline.quantization.scales.base import BlockProblem, BlockScales
from pipeline.quantization.scales.vectors import choose_vectors, free_scale

CANDIDATES = 48
"""Super-scales that are tried, spread over `SPREAD` of the one that just reaches the largest."""

SPREAD = (0.9, 1.8)
"""Above 1 the range of integers is not used up, below it the largest group is clipped."""

REACH = 2
"""Integers around the rounded ones that are tried for a group."""

SWEEPS = 4
"""Alternations of codes and integers of a group."""


@dataclass(frozen=True)
class _Fits:
    """Free scale s and offset m of each group, and the curvature of its loss around them.

    Attributes:
        scale: [rows, groups].
        offset: [rows, groups].
        ss: Curvature in s, [rows, groups].
        sm: Mixed curvature, [rows, groups].
        mm: Curvature in m, [rows, groups].
    """

    scale: Tensor
    offset: Tensor
    ss: Tensor
    sm: Tensor
    mm: Tensor

    def mirrored(self, top: float) -> _Fits:
        """The same values with negated scales, codes counted from the other end."""
        ss = top * top * self.mm - 2 * top * self.sm + self.ss
        return _Fits(
            -self.scale, self.offset + top * self.scale, ss, top * self.mm - self.sm, self.mm
        )


def hierarchical(problem: BlockProblem, fmt: Format, *, signed: bool = True) -> BlockScales:
    """Super-scales and integers of one super-group of every row.

    Args:
        problem: One super-group.
        fmt: Format with sub-scales.
        signed: Allow negative super-scales and sub-scales where the format does.

    Returns:
        Scales that `choose_sub_scales` may revise; without `inverse_root` with codes.
    """
    parts = [_group_problem(problem, start, fmt) for start in _starts(problem, fmt)]
    fits = _fit_groups(parts, fmt, signed)
    fields, loss = _super_scales(fits, fmt)
    if fmt.affine and signed:
        other, other_loss = _super_scales(fits.mirrored(fmt.levels[-1]), fmt)
        better = (other_loss < loss)[:, None]
        fields = {n: torch.where(better, other[n], value) for n, value in fields.items()}
    scales = _block_scales(fields, fmt)
    codes = []
    for g, part in enumerate(parts):
        scales, indices = choose_sub_scales(part, scales, g, fmt)
        codes.append(indices)
    if problem.inverse_root is not None:
        return scales
    return replace(scales, level_indices=torch.cat(codes, dim=1), revisable=False)


def choose_sub_scales(
    problem: BlockProblem, scales: BlockScales, g: int, fmt: Format
) -> tuple[BlockScales, Tensor]:
    """Choose the integers of one group again, super-scales kept.

    Args:
        problem: The group.
        scales: Scales of its super-group.
        g: Place of the group in the super-group.
        fmt: Format with sub-scales.

    Returns:
        The scales with the group's replaced, and the level indices they were judged with.
    """
    fields = dict(scales.fields)
    d = fields["d"][:, 0].double()
    dmin = fields["dmin"][:, 0].double() if fmt.affine else torch.zeros_like(d)
    sc = fields["sc"][:, g].long()
    if fmt.codebook is not None:
        chosen_sc, indices = choose_vectors(problem, d, sc, fmt)
        fields["sc"] = fields["sc"].clone()
        fields["sc"][:, g] = chosen_sc.to(torch.int8)
        return _block_scales(fields, fmt), indices
    mn = fields["mn"][:, g].long() if fmt.affine else torch.zeros_like(sc)
    found = fit_sub_scales(
        problem.weights,
        problem.metric,
        problem.b,
        (d, dmin),
        (sc, mn, None),
        fmt.grid.to(d.device),
        integer_ranges(fmt),
        reach=REACH,
        sweeps=SWEEPS,
    )
    chosen = {"sc": found.scales} | ({"mn": found.offsets} if fmt.affine else {})
    for name, value in chosen.items():
        column = fields[name].clone()
        column[:, g] = value.to(column.dtype)
        fields[name] = column
    return _block_scales(fields, fmt), found.level_indices


def integer_ranges(fmt: Format) -> tuple[tuple[int, int], tuple[int, int]]:
    """Inclusive ranges of sub-scales and sub-offsets; (0, 0) without offsets."""
    return fmt.sub_scale or (1, 1), fmt.sub_offset or (0, 0)


def _block_scales(fields: dict[str, Tensor], fmt: Format) -> BlockScales:
    wide = {
        n: value.double() if value.is_floating_point() else value for n, value in fields.items()
    }
    scale, offset = group_scales(fmt, wide), group_offsets(fmt, wide)
    if offset is None:
        offset = torch.zeros_like(scale)
    return BlockScales(scale, offset, fields, revisable=True)


def _starts(problem: BlockProblem, fmt: Format) -> range:
    return range(0, problem.weights.shape[1], fmt.group_size)


def _group_problem(problem: BlockProblem, start: int, fmt: Format) -> BlockProblem:
    """One group with the others of the super-group unquantized.

    Inside the sequential solver the later ones are still free, so that the metric is the group's
    own Schur complement ``(U_gg' U_gg)^-1``; elsewhere it is the group's block.
    """
    part = slice(start, start + fmt.group_size)
    weights = problem.weights[:, part]
    if problem.inverse_root is not None:
        own = problem.inverse_root[part, part].double()
        metric = torch.cholesky_inverse(own, upper=True)
        return BlockProblem(weights, metric, inverse_root=own)
    metric = problem.metric[part, part]
    gradient = problem.b - problem.weights @ problem.metric
    return BlockProblem(weights, metric, gradient[:, part] + weights @ metric)


def _fit_groups(parts: list[BlockProblem], fmt: Format, signed: bool) -> _Fits:
    columns = [_fit_group(part, fmt, signed) for part in parts]
    stacked = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    return _Fits(*stacked)


def _fit_group(part: BlockProblem, fmt: Format, signed: bool) -> tuple[Tensor, ...]:
    """Scale, offset and curvatures of one group on its own, each [rows]."""
    if fmt.codebook is not None:
        scale, curvature = free_scale(part, fmt)
        zero = torch.zeros_like(scale)
        return scale, zero, curvature, zero, zero
    w, M, b = part.weights.double(), part.metric.double(), part.b.double()
    if fmt.affine:
        codes = seed_codes(w, M, b, len(fmt.levels) - 1)
        scale, offset = fit_offsets(codes, M, b)
        q = codes.double()
    else:
        grid = fmt.grid.to(w.device)
        swept = piso_sweep(w, M, b, grid, signed=may_mirror(fmt, signed))
        scale, q = swept.scales, grid[swept.level_indices]
        offset = torch.zeros_like(scale)
    product = q @ M
    mm = M.sum().expand_as(scale)
    return scale, offset, (q * product).sum(1), product.sum(1), mm


def _super_scales(fits: _Fits, fmt: Format) -> tuple[dict[str, Tensor], Tensor]:
    """Fields of the super-group and the loss that its lattice costs, [rows]."""
    lattice = fmt.scale_lattice
    if not fmt.affine:
        lattice = replace(lattice, signed=lattice.signed and fmt.signed_scale)
        d, sc, loss = _grid_fit(fits.scale, fits.ss, integer_ranges(fmt)[0], lattice, fmt.sub_step)
        return {"d": d, "sc": sc}, loss
    # The offset follows the scale: what remains of the scale's curvature is its own.
    own = (fits.ss - fits.sm.square() / fits.mm).clamp_min(0)
    d, sc, loss = _grid_fit(fits.scale, own, integer_ranges(fmt)[0], lattice)
    shifted = fits.offset + fits.sm / fits.mm * (fits.scale - d.double() * sc)
    dmin, mn, more = _grid_fit(-shifted, fits.mm, integer_ranges(fmt)[1], lattice)
    return {"d": d, "sc": sc, "dmin": dmin, "mn": mn}, loss + more


def _grid_fit(
    wanted: Tensor,
    curvature: Tensor,
    limits: tuple[int, int],
    lattice: ScaleLattice,
    step: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit and integers whose products come closest to the wanted values.

    Args:
        wanted: [rows, groups].
        curvature: Weight of each squared difference, [rows, groups].
        limits: Inclusive range of the integers.
        lattice: Storage of the unit.
        step: Spacing of the integers in their range.

    Returns:
        Unit float32 [rows, 1], integers int8 [rows, groups], loss [rows].
    """
    largest = wanted.gather(1, (wanted.abs() * curvature.sqrt()).argmax(1, keepdim=True))
    largest = torch.maximum(wanted.abs().amax(1, keepdim=True) / 2, largest.abs())
    reached = [end for end in limits if end < 0 or end == limits[1]]
    ends = torch.tensor([end for end in reached if end], dtype=wanted.dtype, device=wanted.device)
    spread = torch.linspace(1 / SPREAD[1], 1 / SPREAD[0], CANDIDATES, dtype=wanted.dtype)
    fractions = (ends[:, None] * spread.to(ends)).reshape(-1)
    units = largest / fractions
    if limits[0] >= 0 and lattice.signed:
        units = torch.cat([units, -units], dim=1)
    unit, integers, loss = _best_unit(wanted, curvature, lattice.round(units), limits, step)
    for _ in range(2):
        squares = (curvature * integers.square()).sum(1, keepdim=True)
        fitted = (curvature * integers * wanted).sum(1, keepdim=True)
        fitted = torch.where(squares > 0, fitted / torch.where(squares > 0, squares, 1.0), unit)
        near = torch.cat([unit, *lattice.neighbours(fitted)], dim=1)
        unit, integers, loss = _best_unit(wanted, curvature, near, limits, step)
    return unit.float(), integers.to(torch.int8), loss


def _best_unit(
    wanted: Tensor, curvature: Tensor, units: Tensor, limits: tuple[int, int], step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of some units [rows, candidates], its integers and the loss."""
    best = (units[:, :1], torch.zeros_like(wanted), torch.full_like(wanted[:, 0], torch.inf))
    for unit in units.split(1, dim=1):
        safe = torch.where(unit == 0, 1.0, unit)
        integers = nearest_integers(wanted / safe, limits, step)
        loss = (curvature * (wanted - unit * integers).square()).sum(1)
        better = loss < best[2]
        column = better[:, None]
        best = (
            torch.where(column, unit, best[0]),
            torch.where(column, integers, best[1]),
            torch.where(better, loss, best[2]),
        )
    return best
