"""`quantize_layer`: the one entry that strings target, scales, rounding and refinement together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pipeline.errors import UnsupportedError
from pipeline.quantization.formats import Format, QuantizedTensor
from pipeline.quantization.objective import HeldOut, LayerObjective
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.refine import refine
from pipeline.quantization.rounding.gpfq import solve_gpfq
from pipeline.quantization.rounding.gptaq import gptaq_drift
from pipeline.quantization.rounding.groupwise import solve_groupwise
from pipeline.quantization.rounding.nearest import solve_nearest
from pipeline.quantization.rounding.qronos import solve_qronos
from pipeline.quantization.rounding.sequential import Metric, solve_sequential
from pipeline.quantization.scales import SCALE_RULES, ScaleRule, piso
from pipeline.quantization.scales.fixed import fixed_scales

Rounding = Literal["nearest", "groupwise", "gptq", "gptaq", "qronos", "gpfq"]
Scales = Literal["absmax", "mse", "proxy", "piso", "lookahead"]


@dataclass(frozen=True)
class LayerOptions:
    """How one layer is quantized.

    Attributes:
        scales: Name of the scale rule, a key of `SCALE_RULES`.
        hessian: What PiSO keeps of the metric: all of it, its diagonal, or nothing of it.
        free_scales: PiSO keeps each interval's codes and fits the scale outside the interval too.
        signed: Allow negative scales where the format does.
        metric: What the scale rule minimises inside the sequential solver.
        interleave: Scales are chosen when the solver enters a ``group``, or for the whole ``layer``
            before it starts.
        rounding: ``nearest``; ``groupwise`` (each group against the residual of the others);
            ``gptq`` on the targets of `LayerObjective.target`, which makes it Qronos and CoreQ too;
            ``gptaq``; ``qronos`` (the published two-step form, ignores `mismatch`); ``gpfq``.
        passes: Passes over the groups of ``groupwise``, and of ``layer`` interleaving if above 0.
        activation_order: Visit columns by descending diagonal of H, groups kept whole.
        orders: Solutions under so many orders of groups are compared, row by row.
        refine_rounds: Most rounds of joint scale refit and coordinate descent.
        mismatch: Share of the correction for differing inputs, see `LayerObjective.target`.
        stream_correction: Share of the correction of the residual stream, likewise.
        seed: Seed of the random orders.
    """

    scales: Scales = "piso"
    hessian: Literal["dense", "diagonal", "identity"] = "dense"
    free_scales: bool = False
    signed: bool = True
    metric: Metric = "schur"
    interleave: Literal["group", "layer"] = "group"
    rounding: Rounding = "gptq"
    passes: int = 1
    activation_order: bool = True
    orders: int = 1
    refine_rounds: int = 0
    mismatch: float = 1.0
    stream_correction: float = 0.0
    seed: int = 0

    def rule(self) -> ScaleRule:
        """The scale rule with its options."""
        if self.scales == "piso":
            return partial(
                piso,
                signed=self.signed,
                clamp=not self.free_scales,
                hessian=self.hessian,
            )
        return partial(SCALE_RULES[self.scales], signed=self.signed)


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer and its squared output error, float64 [out], summed over tokens.

    Attributes:
        quantized: Codes and scales.
        loss: ``(v - t)' H (v - t)`` of every row.
        relative_loss: Sum of the losses over the sum of the targets' own energies.
        refined: Loss after each round of refinement, relative to before; the first is 1.
        refine_kept: Round that was kept.
    """

    quantized: QuantizedTensor
    loss: Tensor
    relative_loss: float
    refined: tuple[float, ...] = (1.0,)
    refine_kept: int = 0


def quantize_layer(
    weight: Tensor,
    objective: LayerObjective,
    fmt: Format,
    options: LayerOptions,
    held_out: HeldOut | None = None,
    mismatch: Tensor | None = None,
) -> LayerResult:
    """Quantize the linears of one site; rows are independent, so linears may be stacked.

    Args:
        weight: Float weights, [out, in].
        objective: Second moments of the shared input.
        fmt: Format of all rows.
        options: Target, scale rule, rounding and refinement.
        held_out: Moments of tokens that the objective has not seen; refinement keeps the round
            that is best on them. None keeps the last.
        mismatch: Share of the mismatch correction of every row, [out, 1], instead of the options'.

    Raises:
        UnsupportedError: The width does not divide into the format's blocks, or the rounding cannot
            choose vectors of a codebook.
    """
    width = weight.shape[1]
    if not fmt.fits(width):
        raise UnsupportedError(
            f"type {fmt.name} cannot hold rows of {width} weights",
            why=f"it stores blocks of {fmt.stored_block(width)}, which do not divide {width}",
            fix="choose a type with smaller blocks, or allow replacement with --allow-fallback",
        )
    check_rounding(fmt, options.rounding)
    share = options.mismatch if mismatch is None else mismatch
    target = objective.target(weight, share, options.stream_correction)
    allowed = fmt if options.signed else fmt.positive()
    quantized = _solve(weight, target, objective, allowed, options)
    refined: tuple[float, ...] = (1.0,)
    kept = 0
    if options.refine_rounds:
        done = refine(
            quantized,
            objective.hessian,
            target,
            rounds=options.refine_rounds,
            signed=options.signed,
            held_out=None if held_out is None else partial(held_out.loss, weight=weight),
        )
        start = max(done.losses[0], 1e-300)
        quantized, kept = done.quantized, done.kept
        refined = tuple(loss / start for loss in done.losses)
    quantized = replace(quantized, format=fmt)
    loss = objective.loss(quantized.dequantize(), target)
    energy = ((target @ objective.hessian) * target).sum()
    relative = float(loss.sum() / energy.clamp_min(1e-300))
    return LayerResult(quantized, loss, relative, refined, kept)


def check_rounding(fmt: Format, rounding: Rounding) -> None:
    """Refuse a method that cannot find codes of a format.

    Raises:
        UnsupportedError: It rounds column by column, and the format stores vectors of a codebook.
    """
    if fmt.codebook is not None and rounding in ("gptaq", "gpfq"):
        raise UnsupportedError(
            f"type {fmt.name} cannot be rounded by {rounding}",
            why="its vectors are chosen as a whole, and that method rounds column by column",
            fix="use quantization.rounding gptq (with mismatch it is Qronos), or another type",
        )


def _solve(
    weight: Tensor, target: Tensor, objective: LayerObjective, fmt: Format, options: LayerOptions
) -> QuantizedTensor:
    rule = options.rule()
    if options.rounding == "nearest":
        return solve_nearest(target, objective.hessian, fmt, rule)
    if options.rounding == "groupwise":
        return solve_groupwise(target, objective.hessian, fmt, rule, passes=options.passes)
    best: QuantizedTensor | None = None
    for order in _orders(objective.hessian.diagonal(), fmt, options):
        found = _solve_in_order(weight, target, objective, order, fmt, options)
        best = found if best is None else _better_rows(best, found, objective, target)
    if best is None:
        raise ValueError("no column order to follow")
    return best


def _orders(diagonal: Tensor, fmt: Format, options: LayerOptions) -> Iterator[ColumnOrder]:
    """The order that was asked for, then random orders of the groups."""
    if options.activation_order:
        yield ColumnOrder.by_activation(diagonal, fmt)
    else:
        yield ColumnOrder.natural(len(diagonal), fmt)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.orders - 1):
        yield ColumnOrder.shuffled(diagonal, fmt, generator)


def _solve_in_order(
    weight: Tensor,
    target: Tensor,
    objective: LayerObjective,
    order: ColumnOrder,
    fmt: Format,
    options: LayerOptions,
) -> QuantizedTensor:
    rule = options.rule()
    H, G = objective.hessian, objective.cross
    if options.interleave == "layer":
        alone = (
            solve_groupwise(target, H, fmt, rule, passes=options.passes)
            if options.passes
            else solve_nearest(target, H, fmt, rule)
        )
        rule = fixed_scales(alone, order.super_groups)
    if options.rounding == "gpfq":
        return solve_gpfq(weight, H, G, order, fmt, rule)
    factor = objective.factor(order.columns)
    if options.rounding == "qronos":
        cross = H if G is None else G
        return solve_qronos(weight, H, cross, factor, order, fmt, rule, metric=options.metric)
    drift = None
    if options.rounding == "gptaq" and G is not None:
        drift, target = gptaq_drift(H, G, factor), weight.double()
    return solve_sequential(target, H, factor, order, fmt, rule, metric=options.metric, drift=drift)


def _better_rows(
    a: QuantizedTensor, b: QuantizedTensor, objective: LayerObjective, target: Tensor
) -> QuantizedTensor:
    """The better of two solutions in every row."""
    take = objective.loss(b.dequantize(), target) < objective.loss(a.dequantize(), target)
    take = take[:, None]
    scales = {n: torch.where(take, b.scales[n], value) for n, value in a.scales.items()}
    return QuantizedTensor(a.format, torch.where(take, b.codes, a.codes), scales)


def quantize_free(
    weight: Tensor, fmt: Format, scales: Literal["absmax", "piso"]
) -> QuantizedTensor:
    """Quantize without data: round to nearest under ``||v - w||^2``.

    Args:
        weight: [out, in], any float type.
        fmt: Format of all rows.
        scales: Scale rule; ``piso`` is the exact minimum for single-scale formats.
    """
    return solve_nearest(weight, None, fmt, SCALE_RULES[scales])
