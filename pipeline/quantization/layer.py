"""`quantize_layer`: the one entry that strings target, scales and rounding together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from pipeline.errors import UnsupportedError
from pipeline.quantization.formats import Format, QuantizedTensor
from pipeline.quantization.objective import LayerObjective
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.rounding.nearest import solve_nearest
from pipeline.quantization.rounding.sequential import Metric, solve_sequential
from pipeline.quantization.scales import SCALE_RULES


@dataclass(frozen=True)
class LayerOptions:
    """How one layer is quantized.

    Attributes:
        scales: Name of the scale rule, ``absmax`` or ``piso``.
        rounding: ``nearest`` or ``gptq`` (sequential, with error feedback).
        metric: What the scale rule minimises inside the sequential solver.
        signed: Allow negative scales where the format does.
        activation_order: Visit columns by descending diagonal of H, groups kept whole.
        mismatch: Share of the correction for differing inputs, see `LayerObjective.target`.
    """

    scales: Literal["absmax", "piso"] = "piso"
    rounding: Literal["nearest", "gptq"] = "gptq"
    metric: Metric = "schur"
    signed: bool = True
    activation_order: bool = True
    mismatch: float = 1.0


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer and its squared output error, float64 [out], summed over tokens.

    `relative_loss` divides the sum by that of the target's own output energy.
    """

    quantized: QuantizedTensor
    loss: Tensor
    relative_loss: float


def quantize_layer(
    weight: Tensor, objective: LayerObjective, fmt: Format, options: LayerOptions
) -> LayerResult:
    """Quantize the linears of one site; rows are independent, so linears may be stacked.

    Args:
        weight: Float weights, [out, in].
        objective: Second moments of the shared input.
        fmt: Format of all rows.
        options: Target, scale rule and rounding.

    Raises:
        UnsupportedError: The width does not divide into the format's blocks.
    """
    width = weight.shape[1]
    if not fmt.fits(width):
        raise UnsupportedError(
            f"type {fmt.name} cannot hold rows of {width} weights",
            why=f"it stores blocks of {fmt.block_of(width)} and {width} is not a multiple of that",
            fix="choose a type with smaller blocks, or allow replacement with --allow-fallback",
        )
    target = objective.target(weight, options.mismatch)
    rule = partial(SCALE_RULES[options.scales], signed=options.signed)
    if options.rounding == "nearest":
        quantized = solve_nearest(target, objective.hessian, fmt, rule)
    else:
        diagonal = objective.hessian.diagonal()
        order = (
            ColumnOrder.by_activation(diagonal, fmt)
            if options.activation_order
            else ColumnOrder.natural(width, fmt)
        )
        factor = objective.factor(order.columns)
        quantized = solve_sequential(
            target, objective.hessian, factor, order, fmt, rule, metric=options.metric
        )
    loss = objective.loss(quantized.dequantize(), target)
    energy = ((target @ objective.hessian) * target).sum()
    return LayerResult(quantized, loss, float(loss.sum() / energy.clamp_min(1e-300)))


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
