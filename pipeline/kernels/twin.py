"""The hot loops in plain PyTorch, vectorised over rows: the oracle of the compiled forms.

Contracts are documented in `pipeline.kernels`. Runs on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_index(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each value; a tie goes to the upper one."""
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.searchsorted(midpoints, values.contiguous(), right=True)


def _events(weights: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Transition scales of all rows, descending: positions, columns, index steps, start indices.

    Shapes [rows, events] and [rows, inputs]. A pair of weight and midpoint with different signs
    never meets at a positive scale; it is an event at 0 that changes nothing.
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
    return positions, columns[order], steps.gather(1, order), start


def _lattice_candidates(scale: Tensor, bits: int, min_exponent: int) -> tuple[Tensor, Tensor]:
    _, exponent = torch.frexp(scale)
    step = torch.ldexp(torch.ones_like(scale), (exponent - bits).clamp_min(min_exponent))
    return torch.floor(scale / step) * step, torch.ceil(scale / step) * step


def _sweep_positive(
    weights: Tensor,
    hessian: Tensor,
    linear: Tensor,
    levels: Tensor,
    clamp: bool,
    bits: int,
    min_exponent: int,
    largest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best positive scale of every row: (scales, level indices, objective)."""
    positions, columns, steps, indices = _events(weights, levels)
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
        usable = (high > low) & (beta > 0) & (vertex > 0) & vertex.isfinite()
        for scale in _lattice_candidates(torch.where(usable, vertex, 1.0), bits, min_exponent):
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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.piso_sweep`. A negative scale is a positive one on mirrored levels."""
    limits = (clamp, bits, min_exponent, largest)
    scales, indices, objective = _sweep_positive(weights, hessian, linear, levels, *limits)
    if signed:
        mirrored = -levels.flip(0)
        other, flipped, value = _sweep_positive(weights, hessian, linear, mirrored, *limits)
        better = value < objective
        scales = torch.where(better, -other, scales)
        indices = torch.where(better[:, None], len(levels) - 1 - flipped, indices)
        objective = torch.where(better, value, objective)
    return scales, indices, objective


def round_columns(
    weights: Tensor,
    factor: Tensor,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """See `pipeline.kernels.round_columns`."""
    work = weights.clone()
    indices = torch.empty(weights.shape, dtype=torch.int64, device=weights.device)
    errors = torch.empty_like(weights)
    zero = nearest_index(torch.zeros(1, dtype=levels.dtype, device=levels.device), levels)
    for i in range(weights.shape[1]):
        scale, offset = scales[:, i // group_size], offsets[:, i // group_size]
        index = nearest_index((work[:, i] - offset) / scale, levels)
        index = torch.where(scale == 0, zero, index)
        error = (work[:, i] - (scale * levels[index] + offset)) / factor[i, i]
        indices[:, i], errors[:, i] = index, error
        work[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    return indices, errors


def fit_affine(
    weights: Tensor, hessian: Tensor, levels: int, starts: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.fit_affine`."""
    low, high = weights.amin(1), weights.amax(1)
    best_scale, best_offset = torch.zeros_like(low), low.clone()
    best = torch.where(high == low, 0.0, torch.full_like(low, float("inf")))
    best_codes = torch.zeros_like(weights)
    total, linear = hessian.sum(), weights @ hessian
    energy, ob = (linear * weights).sum(1), linear.sum(1)
    for shrink, position in starts:
        scale = shrink * (high - low) / (levels - 1)
        offset = low + (1 - shrink) * (high - low) * position
        objective = torch.full_like(low, float("inf"))
        fitted_codes = torch.zeros_like(weights)
        active = high > low
        for _ in range(iterations):
            codes = torch.floor((weights - offset[:, None]) / scale[:, None] + 0.5)
            codes = torch.where(active[:, None], codes.clamp(0, levels - 1), 0.0)
            product = codes @ hessian
            qq, qo, qb = (codes * product).sum(1), product.sum(1), (codes * linear).sum(1)
            determinant = qq * total - qo * qo
            fitted = (qb * total - ob * qo) / determinant
            shift = (ob * qq - qb * qo) / determinant
            value = energy - fitted * qb - shift * ob
            active = (
                active & (determinant > 1e-12 * qq * total) & (fitted > 0) & (value < objective)
            )
            scale = torch.where(active, fitted, scale)
            offset = torch.where(active, shift, offset)
            objective = torch.where(active, value, objective)
            fitted_codes = torch.where(active[:, None], codes, fitted_codes)
        better = objective < best
        best_scale = torch.where(better, scale, best_scale)
        best_offset = torch.where(better, offset, best_offset)
        best_codes = torch.where(better[:, None], fitted_codes, best_codes)
        best = torch.where(better, objective, best)
    return best_scale, best_offset, best_codes.long(), best
