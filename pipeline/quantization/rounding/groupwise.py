"""Group after group, each against the error that the others leave: block coordinate descent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.quantization.formats import Format, QuantizedTensor
from pipeline.quantization.rounding.nearest import nearest_codes
from pipeline.quantization.scales.base import BlockProblem, ScaleRule

ROW_CHUNK = 1024
"""Rows that are handled together, which bounds memory."""

SMALLEST_GAIN = 1e-12
"""Share of a step's curvature that must be gained: less may be rounding error and never end."""


def solve_groupwise(
    target: Tensor,
    hessian: Tensor,
    fmt: Format,
    rule: ScaleRule,
    *,
    passes: int = 1,
    order: Tensor | None = None,
    rounded: Tensor | None = None,
) -> QuantizedTensor:
    """Round the (super-)groups of every row one after the other, without feedback inside a group.

    The first pass is the sequential variant of Piecewise Scale Optimization (arXiv 2606.10890): a
    group's scale and codes minimise ``(v - t)' H (v - t)`` with the groups before it quantized and
    those after it still float. Every further pass solves each group again, now with all the others
    quantized, from two sets of weights to round: the given ones, and the group's conditional
    minimum ``H_gg^-1 b_g``. A row's group is replaced only where that lowers the row's loss, so the
    loss never rises, and passes end early once nothing changes.

    Args:
        target: Where the loss is smallest, t, [out, in].
        hessian: Damped H, [in, in].
        fmt: Format of all rows.
        rule: Scale rule, called for every (super-)group.
        passes: Most passes over all groups.
        order: Visiting order of the (super-)groups, int64 [in / block]; by default descending sum
            of ``diag(H)`` over the group.
        rounded: What is rounded to nearest and stands for groups not yet quantized, [out, in]: the
            float weights where the target corrects a mismatch of inputs. Default: the target.

    Raises:
        InputError: `passes` is below 1, or `order` is not a permutation of the groups.
    """
    width = target.shape[1]
    block = fmt.block_of(width)
    if passes < 1:
        raise InputError(f"{passes} passes over the groups", fix="ask for at least 1")
    if order is None:
        mass = hessian.diagonal().reshape(-1, block).sum(1)
        order = torch.argsort(mass, descending=True, stable=True)
    visits = order.tolist()
    if sorted(visits) != list(range(width // block)):
        raise InputError(
            "the order of the groups is not a permutation",
            why=f"it has {len(visits)} entries for the groups 0..{width // block - 1}",
        )
    floats = target if rounded is None else rounded
    parts = []
    for t, w in zip(target.split(ROW_CHUNK), floats.split(ROW_CHUNK), strict=True):
        rows = _Rows(t.double(), w.double(), hessian.double(), fmt, rule)
        rows.solve(visits, passes)
        parts.append(rows.assemble())
    codes = torch.cat([part.codes for part in parts])
    names = parts[0].scales
    return QuantizedTensor(fmt, codes, {n: torch.cat([p.scales[n] for p in parts]) for n in names})


@dataclass
class _Block:
    """One (super-)group of some rows as it is stored, and its values as the runtime computes them.

    Attributes:
        values: float64 [rows, block].
        fields: The stored scales, each [rows, n], and the level indices, [rows, block].
    """

    values: Tensor
    fields: dict[str, Tensor]


class _Rows:
    """Rows in work: ``residual = (t - v) H`` is kept up to date with every change of v."""

    def __init__(
        self, target: Tensor, weights: Tensor, hessian: Tensor, fmt: Format, rule: ScaleRule
    ) -> None:
        self.weights, self.hessian, self.fmt, self.rule = weights, hessian, fmt, rule
        self.block = fmt.block_of(weights.shape[1])
        self.values = weights.clone()
        self.residual = (target - weights) @ hessian
        self.blocks: dict[int, _Block] = {}

    def solve(self, order: list[int], passes: int) -> None:
        """Quantize all groups, then improve them until nothing changes."""
        for g in order:
            self._put(g, self._quantize(g, self.weights[:, self._columns(g)]))
        for _ in range(passes - 1):
            changed = [self._improve(g) for g in order]
            if not any(changed):
                break

    def assemble(self) -> QuantizedTensor:
        """Codes and scales in storage order."""
        blocks = [self.blocks[g].fields for g in sorted(self.blocks)]
        stored = {name: torch.cat([b[name] for b in blocks], dim=1) for name in blocks[0]}
        codes = (stored.pop("indices") + self.fmt.code_min).to(torch.int8)
        return QuantizedTensor(self.fmt, codes, stored)

    def _columns(self, g: int) -> slice:
        return slice(g * self.block, (g + 1) * self.block)

    def _quantize(self, g: int, weights: Tensor) -> _Block:
        """Round `weights` at the scales that fit best while the other groups stay as they are."""
        part = self._columns(g)
        metric = self.hessian[part, part]
        linear = self.residual[:, part] + self.values[:, part] @ metric
        scales = self.rule(BlockProblem(weights, metric, linear), self.fmt)
        indices = scales.level_indices
        if indices is None:
            indices = nearest_codes(weights, scales, self.fmt)
        group = self.fmt.group_of(self.weights.shape[1])
        levels = self.fmt.grid.float().to(weights.device)
        scale = scales.scale.float().repeat_interleave(group, dim=1)
        offset = scales.offset.float().repeat_interleave(group, dim=1)
        # In float32 like `QuantizedTensor.dequantize`, so that losses compare what is stored.
        values = (scale * levels[indices] + offset).double()
        return _Block(values, {**scales.fields, "indices": indices})

    def _put(self, g: int, new: _Block) -> None:
        part = self._columns(g)
        step = new.values - self.values[:, part]
        moved = step.any(1)
        self.residual[moved] -= step[moved] @ self.hessian[part]
        self.values[:, part] = new.values
        self.blocks[g] = new

    def _improve(self, g: int) -> bool:
        """Solve one group again; whether any row took the result."""
        part = self._columns(g)
        metric, residual = self.hessian[part, part], self.residual[:, part]
        old, values = self.blocks[g], self.values[:, part]
        centre = values + torch.linalg.solve(metric, residual.T).T
        fields, best = dict(old.fields), values.clone()
        lowest = values.new_zeros(len(values))
        for weights in (self.weights[:, part], centre):
            new = self._quantize(g, weights)
            step = new.values - values
            curvature = ((step @ metric) * step).sum(1)
            change = curvature - 2 * (step * residual).sum(1)
            better = change < lowest - SMALLEST_GAIN * curvature
            lowest = torch.where(better, change, lowest)
            better = better[:, None]
            best = torch.where(better, new.values, best)
            fields = {n: torch.where(better, new.fields[n], fields[n]) for n in fields}
        if not (lowest < 0).any():
            return False
        self._put(g, _Block(best, fields))
        return True
