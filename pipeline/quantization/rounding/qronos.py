"""Qronos in its published two-step form, expressed as a target of the sequential solver."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantization.formats import Format, QuantizedTensor
from pipeline.quantization.objective import Factor
from pipeline.quantization.order import ColumnOrder
from pipeline.quantization.rounding.sequential import Metric, solve_sequential
from pipeline.quantization.scales.base import ScaleRule


def qronos_target(weight: Tensor, hessian: Tensor, cross: Tensor, factor: Factor) -> Tensor:
    """The target under which the sequential solver takes the steps of Qronos, float64 [out, in].

    Qronos (arXiv 2505.11695) rounds its first column at the minimiser of ``||X w - Xq v||^2`` with
    the other weights still float, ``(g_0' w - h_0' w + H_00 w_0) / H_00``, then solves for all the
    others and goes on as GPTQ. Sequential rounding of ``T = W G' H^-1`` differs in the first step
    only, where it rounds T_0. Moving T along the first row of U puts the minimiser in place of T_0
    and leaves what the others become, once the first code is known, as it was.

    Args:
        weight: Float weights, [out, in].
        hessian: Damped H, [in, in].
        cross: ``G = Xq' X`` with the same damping, [in, in].
        factor: Factors of H in solver order.
    """
    W, H, G = weight.double(), hessian.double(), cross.double()
    columns, U = factor.columns, factor.inverse_root
    first = columns[0]
    shift = (W @ (G - H).T)[:, columns]
    target = W[:, columns] + shift @ U.T @ U
    start = W[:, first] + shift[:, 0] / H[first, first]
    target -= ((target[:, 0] - start) / U[0, 0])[:, None] * U[0]
    stored = torch.empty_like(target)
    stored[:, columns] = target
    return stored


def solve_qronos(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor,
    factor: Factor,
    order: ColumnOrder,
    fmt: Format,
    rule: ScaleRule,
    *,
    metric: Metric = "schur",
) -> QuantizedTensor:
    """Round by Qronos in two steps: the first column alone, then all others sequentially.

    Args:
        weight: Float weights, [out, in].
        hessian: Damped H, [in, in].
        cross: ``G = Xq' X`` with the same damping, [in, in].
        factor: Factors of H in the order of `order.columns`.
        order: Column order that keeps the format's blocks whole.
        fmt: Format of all rows.
        rule: Scale rule, called once per block with all rows.
        metric: What the rule minimises, see `solve_sequential`.
    """
    target = qronos_target(weight, hessian, cross, factor)
    return solve_sequential(target, hessian, factor, order, fmt, rule, metric=metric)
