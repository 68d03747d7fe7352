"""The diagonal PiSO sweep in plain PyTorch: sort and prefix sums, no loop over transitions.

The contract is in `pipeline.kernels.diagonal`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.twin.sweep import lattice_candidates, transitions

CHUNK_EVENTS = 1 << 22
"""Transitions that are sorted together, which bounds memory."""


def _increments(
    weights: Tensor, diagonal: Tensor, linear: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor]:
    """Changes of q'b and q'Hq at every pair of weight and midpoint, [rows, inputs * midpoints]."""
    away = weights.sign()[:, :, None]
    shift = away * levels.diff() * linear[:, :, None]
    growth = away * levels.square().diff() * diagonal[:, :, None]
    return shift.flatten(1), growth.flatten(1)


def _sweep_positive(
    weights: Tensor,
    diagonal: Tensor,
    linear: Tensor,
    levels: Tensor,
    clamp: bool,
    bits: int,
    min_exponent: int,
    largest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best positive scale of every row: (scales, level indices, objective)."""
    positions, columns, steps, start, order = transitions(weights, levels)
    shift, growth = (t.gather(1, order) for t in _increments(weights, diagonal, linear, levels))
    # Pairs of opposite sign never meet; they are sorted to scale 0, behind every interval.
    low = torch.nn.functional.pad(positions, (0, 1))
    high = torch.nn.functional.pad(positions, (1, 0), value=float("inf"))
    codes = levels[start]
    first = ((codes * linear).sum(1), (codes.square() * diagonal).sum(1))
    alpha, beta = (
        torch.cat([f[:, None], step], dim=1).cumsum(1)
        for f, step in zip(first, (shift, growth), strict=True)
    )
    vertex = alpha / beta
    if clamp:
        vertex = torch.minimum(torch.maximum(vertex, low), high)
    vertex = vertex.clamp_max(largest)
    usable = (high > low) & (beta > 0) & (vertex > 0) & vertex.isfinite()
    best, chosen = torch.zeros_like(first[0]), torch.zeros_like(first[0])
    count = start.new_zeros(len(start))
    for scale in lattice_candidates(torch.where(usable, vertex, 1.0), bits, min_exponent):
        inside = usable & (scale > 0) & (scale <= largest)
        if clamp:
            inside &= (scale >= low) & (scale <= high)
        objective = torch.where(inside, scale * (beta * scale - 2 * alpha), float("inf"))
        value, at = objective.min(dim=1)
        better = value < best
        best = torch.where(better, value, best)
        chosen = torch.where(better, scale.gather(1, at[:, None])[:, 0], chosen)
        count = torch.where(better, at, count)
    passed = torch.arange(positions.shape[1], device=weights.device) < count[:, None]
    return chosen, start.scatter_add(1, columns, steps * passed), best


def _rows(
    weights: Tensor, diagonal: Tensor, linear: Tensor, levels: Tensor, signed: bool, limits: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    scales, indices, objective = _sweep_positive(weights, diagonal, linear, levels, *limits)
    if signed:
        mirrored = -levels.flip(0)
        other, flipped, value = _sweep_positive(weights, diagonal, linear, mirrored, *limits)
        better = value < objective
        scales = torch.where(better, -other, scales)
        indices = torch.where(better[:, None], len(levels) - 1 - flipped, indices)
        objective = torch.where(better, value, objective)
    return scales, indices, objective


def piso_sweep_diagonal(
    weights: Tensor,
    diagonal: Tensor,
    linear: Tensor,
    levels: Tensor,
    signed: bool,
    clamp: bool,
    bits: int,
    min_exponent: int,
    largest: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.piso_sweep_diagonal`; the diagonal is [1 or rows, inputs]."""
    limits = (clamp, bits, min_exponent, largest)
    chunk = max(1, CHUNK_EVENTS // (weights.shape[1] * len(levels)))
    parts = [
        _rows(w, h, b, levels, signed, limits)
        for w, h, b in zip(
            weights.split(chunk),
            diagonal.expand_as(weights).split(chunk),
            linear.split(chunk),
            strict=True,
        )
    ]
    scales, indices, objective = (torch.cat(column) for column in zip(*parts, strict=True))
    return scales, indices, objective
