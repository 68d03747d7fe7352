"""Refinement of a solved layer: scales refitted jointly, codes by coordinate descent, in turn.

Both steps lower the same quadratic that the solver minimised, ``E(V) = tr((V - T) H (V - T)')``,
and stop at a point that neither can improve. A step that does not lower a row's loss, for example
because its refitted scales had to be put on the storage lattice, leaves that row as it was. Integer
zero points stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels import descend, fit_free, fit_sub_scales, fit_vectors
from pipeline.quantization.formats import (
    Format,
    QuantizedTensor,
    group_offsets,
    group_scales,
    stored_pair,
    zero_offset,
    zero_points,
)
from pipeline.quantization.scales.absmax import may_mirror
from pipeline.quantization.scales.hierarchical import REACH, SWEEPS, integer_ranges
from pipeline.quantization.scales.vectors import neighbours

LAZY_COLUMNS = 256
"""Columns whose changes are gathered before they update the residual of all others."""

FREE_SWEEPS = 2
"""Passes over the codes of a group with a free scale before the next one is visited."""

FINE_BITS = 8
"""Significant bits of a scale below which its rounding can undo the gain of new codes, so that the
codes are also improved under the scale that stands."""

FLOAT_FIELDS = ("d", "m", "dmin")
"""Stored fields that are not integers."""

REFIT_ROWS = 256
"""Rows whose normal equations are built together, which bounds memory."""

RISE = 1e-9
"""Relative rise of a row's loss that is taken for rounding of the arithmetic."""


@dataclass(frozen=True)
class Refined:
    """A refined layer.

    Attributes:
        quantized: The layer at the round that was kept.
        losses: Loss summed over rows: before, then after each round.
        kept: Round that was kept, 0 for none.
    """

    quantized: QuantizedTensor
    losses: tuple[float, ...]
    kept: int


def refine(
    quantized: QuantizedTensor,
    hessian: Tensor,
    target: Tensor,
    *,
    rounds: int,
    signed: bool = True,
    tolerance: float = 1e-4,
    held_out: Callable[[Tensor], float] | None = None,
) -> Refined:
    """Alternate joint refit of scales and coordinate descent on codes until neither helps.

    Args:
        quantized: Start.
        hessian: Damped H, [in, in].
        target: T, [out, in].
        rounds: Most alternations.
        signed: Allow negative scales where the format does.
        tolerance: Stop when a round lowers the total loss by a smaller fraction.
        held_out: Loss of dequantized weights [out, in] on data that H has not seen. With it the
            round with the smallest value is kept, without it the last.

    Raises:
        ArithmeticError: A step raised the loss of a row: a bug in this module.
    """
    state = _State(quantized, hessian, target, signed)
    losses = [float(state.loss().sum())]
    best, kept, chosen = _judged(state.values, held_out), 0, quantized
    for n in range(1, rounds + 1):
        before = state.loss()
        state.refit()
        _check(before, middle := state.loss(), "refit of the scales")
        state.descend()
        _check(middle, after := state.loss(), "coordinate descent")
        losses.append(float(after.sum()))
        judged = _judged(state.values, held_out)
        if judged <= best:
            best, kept, chosen = judged, n, state.quantized()
        if losses[-1] >= losses[-2] * (1 - tolerance):
            break
    return Refined(chosen, tuple(losses), kept)


def _judged(values: Tensor, judge: Callable[[Tensor], float] | None) -> float:
    """What the judge says; a constant without one, so that the last round is kept."""
    return 0.0 if judge is None else judge(values)


def _check(before: Tensor, after: Tensor, step: str) -> None:
    excess = float((after - before * (1 + RISE)).max())
    if excess > RISE * float(before.mean()):
        raise ArithmeticError(f"{step} raised the loss of a row by {excess:g}")


class _State:
    """Codes, scales and residual ``r = (T - V) H`` of all rows, float64."""

    def __init__(
        self, quantized: QuantizedTensor, hessian: Tensor, target: Tensor, signed: bool
    ) -> None:
        self.fmt: Format = quantized.format
        self.signed = signed and self.fmt.signed_scale
        self.mirrors = may_mirror(self.fmt, signed)
        self.hessian, self.target = hessian.double(), target.double()
        self.levels = self.fmt.grid.to(target.device)
        self.indices = quantized.codes.long() - self.fmt.code_min
        self.fields = {name: value.clone() for name, value in quantized.scales.items()}
        self.block = self.fmt.block_of(target.shape[1])
        self.group = self.fmt.group_of(target.shape[1])
        self.unit = self.block if self.fmt.sub_scale is None else self.group
        self._evaluate()

    def quantized(self) -> QuantizedTensor:
        """The layer as it is stored."""
        codes = (self.indices + self.fmt.code_min).to(torch.int8)
        fields = {name: value.clone() for name, value in self.fields.items()}
        return QuantizedTensor(self.fmt, codes, fields)

    def loss(self) -> Tensor:
        """Loss of every row, [out]."""
        return ((self.target - self.values) * self.residual).sum(1)

    def _evaluate(self) -> None:
        self.values = _values(self.quantized())
        self.residual = (self.target - self.values) @ self.hessian

    # --- scales, codes fixed

    def refit(self) -> None:
        """Exact joint least squares over all (super-)scales and offsets of a row, codes fixed.

        The normal equations ``(B'HB) s = B'HT`` of the basis B that has one column a super-group
        (two with offsets); notes on two-stage grid optimization (arXiv 2602.02126) call the
        coordinate-wise form of this stage 2.
        """
        zero = _zero_points(self.fmt, self.fields)
        basis = self._basis()
        fitted = torch.cat(
            [
                _least_squares(
                    [b[part] for b in basis], self.hessian, self.target[part], self.block
                )
                for part in torch.arange(len(self.target)).split(REFIT_ROWS)
            ]
        )
        if not self.signed:
            fitted[..., 0] = fitted[..., 0].clamp_min(0)
        rounded = self.fmt.scale_lattice.round(fitted).float()
        old_fields, old_values, old_residual = dict(self.fields), self.values, self.residual
        before = self.loss()
        for k, name in enumerate(_fitted(self.fmt)):
            self.fields[name] = rounded[..., k].contiguous()
        if self.fmt.zero_points:
            self.fields["m"] = zero_offset(self.fields["d"], zero.float())
        if self.fmt.zero_lattice is not None:
            pair = stored_pair(self.fmt, fitted[..., 0], fitted[..., 1])
            self.fields["d"], self.fields["m"] = (t.float().contiguous() for t in pair)
        self._evaluate()
        better = (self.loss() < before)[:, None]
        for name in old_fields:
            self.fields[name] = torch.where(better, self.fields[name], old_fields[name])
        self.values = torch.where(better, self.values, old_values)
        self.residual = torch.where(better, self.residual, old_residual)

    def _basis(self) -> list[Tensor]:
        """What multiplies each stored scale and offset at every weight, each [out, in]."""
        levels = self.levels[self.indices]
        if self.fmt.sub_scale is not None:
            levels = levels * self.fields["sc"].double().repeat_interleave(self.group, dim=1)
        if self.fmt.zero_points:
            return [
                levels - _zero_points(self.fmt, self.fields).repeat_interleave(self.group, dim=1)
            ]
        if not self.fmt.affine:
            return [levels]
        if self.fmt.sub_offset is None:
            return [levels, torch.ones_like(levels)]
        return [levels, -self.fields["mn"].double().repeat_interleave(self.group, dim=1)]

    # --- codes

    def descend(self) -> None:
        """One cyclic pass over all groups; a group's scale or integers move with its codes."""
        width = self.target.shape[1]
        stride = max(self.block, LAZY_COLUMNS // self.block * self.block)
        for outer in range(0, width, stride):
            end = min(outer + stride, width)
            before = self.values[:, outer:end].clone()
            for start in range(outer, end, self.unit):
                part = slice(start, start + self.unit)
                change = self._descend_group(part)
                self.residual[:, outer:end] -= change @ self.hessian[part, outer:end]
            change = self.values[:, outer:end] - before
            self.residual[:, :outer] -= change @ self.hessian[outer:end, :outer]
            self.residual[:, end:] -= change @ self.hessian[outer:end, end:]

    def _descend_group(self, part: slice) -> Tensor:
        """Improve one group of all rows; returns the change of its values."""
        if self.fmt.sub_scale is not None:
            return self._descend_integers(part)
        if self.fmt.affine:
            return self._descend_fixed(part, self.residual[:, part])
        M, old = self.hessian[part, part], self.values[:, part]
        product = old @ M
        linear = self.residual[:, part] + product
        now = (old * (product - 2 * linear)).sum(1)
        found = fit_free(
            self.indices[:, part],
            linear,
            M,
            self.levels,
            sweeps=FREE_SWEEPS,
            signed=self.signed,
            lattice=self.fmt.scale_lattice,
        )
        better = found.objective < now
        scale = torch.where(better, found.scales, self.fields["d"][:, part.start // self.block])
        index = torch.where(better[:, None], found.level_indices, self.indices[:, part])
        new = torch.where(better[:, None], scale[:, None] * self.levels[index], old)
        self.indices[:, part] = index
        self.fields["d"][:, part.start // self.block] = scale.float()
        change = new - old
        self.values[:, part] = new
        if self.fmt.scale_lattice.significand_bits < FINE_BITS:
            change = change + self._descend_fixed(part, self.residual[:, part] - change @ M)
        return change

    def _descend_fixed(self, part: slice, residual: Tensor) -> Tensor:
        """Codes under the scale and offset that the group has; its own part of the residual."""
        g = part.start // self.group
        scale = self.fields["d"][:, g : g + 1].double()
        offset = self.fields["m"][:, g : g + 1].double() if self.fmt.affine else 0 * scale
        index, change = descend(
            self.indices[:, part],
            scale,
            offset,
            residual,
            self.hessian[part, part],
            self.levels,
            self.group,
        )
        self.indices[:, part] = index
        self.values[:, part] += change
        return change

    def _descend_integers(self, part: slice) -> Tensor:
        """Codes and integers of one group under the super-scales that it has."""
        if self.fmt.codebook is not None:
            return self._descend_vectors(part)
        M, old = self.hessian[part, part], self.values[:, part]
        linear = self.residual[:, part] + old @ M
        centre = old + torch.linalg.solve(M, self.residual[:, part].T).T
        g, s = part.start // self.group, part.start // self.block
        d = self.fields["d"][:, s].double()
        dmin = self.fields["dmin"][:, s].double() if self.fmt.affine else torch.zeros_like(d)
        sc = self.fields["sc"][:, g].long()
        mn = self.fields["mn"][:, g].long() if self.fmt.affine else torch.zeros_like(sc)
        found = fit_sub_scales(
            centre,
            M,
            linear,
            (d, dmin),
            (sc, mn, self.indices[:, part]),
            self.levels,
            integer_ranges(self.fmt),
            reach=REACH,
            sweeps=SWEEPS,
        )
        new = (d * found.scales)[:, None] * self.levels[found.level_indices]
        new = new - (dmin * found.offsets)[:, None]
        self.indices[:, part] = found.level_indices
        self.fields["sc"][:, g] = found.scales.to(torch.int8)
        if self.fmt.affine:
            self.fields["mn"][:, g] = found.offsets.to(torch.int8)
        change = new - old
        self.values[:, part] = new
        return change

    def _descend_vectors(self, part: slice) -> Tensor:
        """Codebook vectors and sub-scale of one group under the super-scale that it has."""
        M, old = self.hessian[part, part], self.values[:, part]
        centre = old + torch.linalg.solve(M, self.residual[:, part].T).T
        g, s = part.start // self.group, part.start // self.block
        d, sc = self.fields["d"][:, s].double(), self.fields["sc"][:, g].long()
        tried = neighbours(sc, self.fmt)
        start = d * sc, self.indices[:, part]
        found = fit_vectors(centre, M, d[:, None] * tried, self.fmt, start=start, sweeps=SWEEPS)
        kept = torch.cat([tried, sc[:, None]], dim=1).gather(1, found.chosen[:, None])
        new = d[:, None] * kept * self.levels[found.level_indices]
        self.indices[:, part] = found.level_indices
        self.fields["sc"][:, g] = kept[:, 0].to(torch.int8)
        change = new - old
        self.values[:, part] = new
        return change


def _fitted(fmt: Format) -> tuple[str, ...]:
    """Stored fields that are numbers of the scale's lattice."""
    if not fmt.affine or fmt.zero_points:
        return ("d",)
    return ("d", "m") if fmt.sub_offset is None else ("d", "dmin")


def _zero_points(fmt: Format, fields: dict[str, Tensor]) -> Tensor:
    """Zero point of each group, float64 [out, groups]; 0 for formats without."""
    d = fields["d"].double()
    return zero_points(fmt, d, fields["m"].double()) if fmt.zero_points else torch.zeros_like(d)


def _values(quantized: QuantizedTensor) -> Tensor:
    """Dequantized weights in float64, [out, in]."""
    fmt, width = quantized.format, quantized.codes.shape[1]
    levels = fmt.grid.to(quantized.codes.device)[quantized.codes.long() - fmt.code_min]
    group = fmt.group_of(width)
    fields = {n: f.double() if n in FLOAT_FIELDS else f for n, f in quantized.scales.items()}
    values = levels * group_scales(fmt, fields).repeat_interleave(group, dim=1)
    offsets = group_offsets(fmt, fields)
    return values if offsets is None else values + offsets.repeat_interleave(group, dim=1)


def _least_squares(basis: list[Tensor], hessian: Tensor, target: Tensor, block: int) -> Tensor:
    """Coefficients of all basis columns that minimise the loss of each row.

    Args:
        basis: Values of each kind of basis function at every weight, each [rows, in].
        hessian: [in, in].
        target: [rows, in].
        block: Columns per coefficient.

    Returns:
        [rows, blocks, kinds].
    """
    rows, width = target.shape
    blocks, kinds = width // block, len(basis)
    linear = target @ hessian
    normal = target.new_empty(rows, blocks, kinds, blocks, kinds)
    right = torch.stack([(b * linear).reshape(rows, blocks, block).sum(2) for b in basis], dim=2)
    for g in range(blocks):
        part = slice(g * block, (g + 1) * block)
        for k, column in enumerate(basis):
            product = column[:, part] @ hessian[part]
            for j, other in enumerate(basis):
                folded = (product * other).reshape(rows, blocks, block).sum(2)
                normal[:, g, k, :, j] = folded
    normal = normal.reshape(rows, blocks * kinds, blocks * kinds)
    right = right.reshape(rows, blocks * kinds, 1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    # A basis column of zeros (all codes at level 0) leaves its coefficient open: make it 0.
    ridge = torch.where(diagonal > 0, 1e-12 * diagonal, 1.0)
    lower, failed = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge))
    solution = torch.cholesky_solve(right, lower)
    solution = torch.where((failed == 0)[:, None, None], solution, 0.0)
    return solution.reshape(rows, blocks, kinds)
