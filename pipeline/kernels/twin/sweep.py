"""The PiSO sweep in plain PyTorch, on any device. The contract is in `pipeline.kernels.sweep`."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.twin.common import nearest_index

CHECK_EVERY = 16
"""Events between two tests of the pruning bound, which costs as much as one event."""


def transitions(weights: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Transition scales of all rows, descending: positions, columns, steps, start, order.

    Positions, columns and index steps are [rows, events], the indices at the start [rows, inputs];
    `order` sorts pairs (input, midpoint), flattened, like the positions. A pair of weight and
    midpoint with different signs never meets at a positive scale; it is an event at 0 that changes
    nothing.
    """
    rows, width = weights.shape
    midpoints = (levels[:-1] + levels[1:]) / 2
    meets = (weights[:, :, None] * midpoints) > 0
    positions = torch.where(meets, weights[:, :, None] / midpoints, 0.0).reshape(rows, -1)
    steps = torch.where(meets, weights[:, :, None].sign(), 0.0).reshape(rows, -1).long()
    columns = torch.arange(width, device=weights.device).repeat_interleave(len(midpoints))
    positions, order = positions.sort(dim=1, descending=True, stable=True)
    start = torch.searchsorted(midpoints, torch.zeros_like(weights), right=True)
    below = torch.searchsorted(midpoints, torch.zeros_like(weights), right=False)
    start = torch.where(weights < 0, below, start)
    return positions, columns[order], steps.gather(1, order), start, order


def lattice_candidates(scale: Tensor, bits: int, min_exponent: int) -> tuple[Tensor, Tensor]:
    """Lattice points at or below and at or above positive scales, any shape."""
    _, exponent = torch.frexp(scale)
    step = torch.ldexp(torch.ones_like(scale), (exponent - bits).clamp_min(min_exponent))
    return torch.floor(scale / step) * step, torch.ceil(scale / step) * step


class _Bound:
    """Lower bounds of the objective below a scale; the proof is in `pipeline.kernels.sweep`."""

    def __init__(
        self, weights: Tensor, linear: Tensor, levels: Tensor, start: Tensor, ceiling: Tensor
    ) -> None:
        first = levels[start]
        last = torch.where(weights > 0, levels[-1], torch.where(weights < 0, levels[0], first))
        self.slopes = torch.maximum(first * linear, last * linear).clamp_min(0)
        gap = levels.diff().max() / 2
        radius = torch.maximum(gap, levels[nearest_index(gap.new_zeros(1), levels)].abs())
        self.nearby, self.growth = linear.abs() * weights.abs(), linear.abs() * radius
        self.ceiling = ceiling

    def hopeless(self, scale: Tensor, best: Tensor) -> Tensor:
        """Rows in which no scale up to `scale` lowers the objective below `best`, bool [rows]."""
        s = scale[:, None]
        reach = torch.minimum(s * self.slopes, self.nearby + s * self.growth).sum(1) * (1 + 1e-9)
        bound = reach * (reach / self.ceiling - 2)
        return (reach < self.ceiling) & (bound >= best * (1 - 1e-9))


def _sweep_positive(
    weights: Tensor,
    hessian: Tensor,
    linear: Tensor,
    levels: Tensor,
    clamp: bool,
    bits: int,
    min_exponent: int,
    largest: float,
    ceiling: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best positive scale of every row: (scales, level indices, objective)."""
    positions, columns, steps, indices, _ = transitions(weights, levels)
    bound = _Bound(weights, linear, levels, indices, ceiling)
    rows = torch.arange(len(weights), device=weights.device)
    gradient = levels[indices] @ hessian
    alpha = (levels[indices] * linear).sum(1)
    beta = (levels[indices] * gradient).sum(1)
    best, best_scale, best_indices = (
        torch.zeros_like(alpha),
        torch.zeros_like(alpha),
        indices.clone(),
    )
    high = torch.full_like(alpha, float("inf"))
    for n in range(positions.shape[1] + 1):
        low = positions[:, n] if n < positions.shape[1] else torch.zeros_like(high)
        vertex = alpha / beta
        if clamp:
            vertex = torch.minimum(torch.maximum(vertex, low), high)
        vertex = vertex.clamp_max(largest)
        usable = (high > low) & (beta > 0) & (vertex > 0) & vertex.isfinite()
        for scale in lattice_candidates(torch.where(usable, vertex, 1.0), bits, min_exponent):
            inside = usable & (scale > 0) & (scale <= largest)
            if clamp:
                inside &= (scale >= low) & (scale <= high)
            objective = scale * (beta * scale - 2 * alpha)
            better = inside & (objective < best)
            best = torch.where(better, objective, best)
            best_scale = torch.where(better, scale, best_scale)
            best_indices = torch.where(better[:, None], indices, best_indices)
        if n == positions.shape[1]:
            break
        high = low
        if n % CHECK_EVERY == 0 and bool(bound.hopeless(high, best).all()):
            break
        i, step = columns[:, n], steps[:, n]
        delta = levels[indices[rows, i] + step] - levels[indices[rows, i]]
        alpha = alpha + delta * linear[rows, i]
        beta = beta + delta * (2 * gradient[rows, i] + delta * hessian[i, i])
        gradient = gradient + delta[:, None] * hessian[i]
        indices[rows, i] += step
    return best_scale, best_indices, best


def piso_sweep(
    weights: Tensor,
    hessian: Tensor,
    linear: Tensor,
    levels: Tensor,
    signed: bool,
    clamp: bool,
    bits: int,
    min_exponent: int,
    largest: float,
    ceiling: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.piso_sweep`. A negative scale is a positive one on mirrored levels.

    Args:
        ceiling: Upper bounds of ``b' H^-1 b``, [rows]; None or a negative one never prunes.
    """
    top = torch.full_like(weights[:, 0], -1) if ceiling is None else ceiling
    limits = (clamp, bits, min_exponent, largest, top)
    scales, indices, objective = _sweep_positive(weights, hessian, linear, levels, *limits)
    if signed:
        mirrored = -levels.flip(0)
        other, flipped, value = _sweep_positive(weights, hessian, linear, mirrored, *limits)
        better = value < objective
        scales = torch.where(better, -other, scales)
        indices = torch.where(better[:, None], len(levels) - 1 - flipped, indices)
        objective = torch.where(better, value, objective)
    return scales, indices, objective
