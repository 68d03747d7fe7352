"""Coordinate descent in plain PyTorch, on any device.

The contract is in `pipeline.kernels.descent`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.twin.common import nearest_index

LEAST_GAIN = 1e-12
"""Decrease below which a move is a rounding error, relative to the objective; with a free scale
also to what the coordinate alone could reach, for where the objective is 0."""


def descend(
    indices: Tensor,
    scales: Tensor,
    offsets: Tensor,
    residual: Tensor,
    metric: Tensor,
    levels: Tensor,
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """See `pipeline.kernels.descend`."""
    indices, gradient = indices.clone(), residual.clone()
    delta = torch.zeros_like(residual)
    for i in range(indices.shape[1]):
        scale, offset = scales[:, i // group_size], offsets[:, i // group_size]
        old = levels[indices[:, i]]
        wanted = scale * old + offset + gradient[:, i] / metric[i, i]
        found = nearest_index((wanted - offset) / torch.where(scale == 0, 1.0, scale), levels)
        step = scale * (levels[found] - old)
        moves = step * (step * metric[i, i] - 2 * gradient[:, i]) < 0
        step = torch.where(moves, step, 0.0)
        indices[:, i] = torch.where(moves, found, indices[:, i])
        delta[:, i] = step
        gradient -= step[:, None] * metric[i]
    return indices, delta


def fit_free(
    indices: Tensor,
    linear: Tensor,
    metric: Tensor,
    levels: Tensor,
    sweeps: int,
    bits: int,
    min_exponent: int,
    largest: float,
    signed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.fit_free`."""
    indices = indices.clone()
    codes = levels[indices]
    product = codes @ metric
    alpha, beta = (codes * linear).sum(1), (codes * product).sum(1)
    for _ in range(sweeps):
        before = indices.clone()
        for i in range(indices.shape[1]):
            d = levels[None, :] - codes[:, i, None]
            a = alpha[:, None] + d * linear[:, i, None]
            b = beta[:, None] + d * (2 * product[:, i, None] + d * metric[i, i])
            usable = b > 0 if signed else (b > 0) & (a > 0)
            value = torch.where(usable, -(a * a) / b, torch.inf)
            best, level = value.min(1)
            now = torch.where(beta > 0, -(alpha * alpha) / beta, 0.0)
            if not signed:
                now = torch.where(alpha > 0, now, 0.0)
            alone = linear[:, i] ** 2 / metric[i, i]
            moves = best < now - LEAST_GAIN * (now.abs() + alone)
            step = torch.where(moves, d.gather(1, level[:, None])[:, 0], 0.0)
            alpha = torch.where(moves, a.gather(1, level[:, None])[:, 0], alpha)
            beta = torch.where(moves, b.gather(1, level[:, None])[:, 0], beta)
            product += step[:, None] * metric[i]
            indices[:, i] = torch.where(moves, level, indices[:, i])
            codes[:, i] = levels[indices[:, i]]
        if torch.equal(before, indices):
            break
    scale, objective = _on_lattice(alpha, beta, bits, min_exponent, largest, signed)
    return scale, indices, objective


def _on_lattice(
    alpha: Tensor,
    beta: Tensor,
    bits: int,
    min_exponent: int,
    largest: float,
    signed: bool,
) -> tuple[Tensor, Tensor]:
    """The better lattice neighbour of the vertex ``alpha / beta``."""
    vertex = torch.where(beta > 0, alpha / torch.where(beta > 0, beta, 1.0), 0.0)
    if not signed:
        vertex = vertex.clamp_min(0)
    magnitude = vertex.abs()
    _, exponent = torch.frexp(torch.where(magnitude > 0, magnitude, 1.0))
    step = torch.ldexp(torch.ones_like(magnitude), (exponent - bits).clamp_min(min_exponent))
    best, scale = torch.zeros_like(alpha), torch.zeros_like(alpha)
    for rounded in (torch.floor(magnitude / step), torch.ceil(magnitude / step)):
        candidate = (rounded * step).clamp_max(largest).copysign(vertex)
        value = candidate * (beta * candidate - 2 * alpha)
        better = value < best
        best, scale = torch.where(better, value, best), torch.where(better, candidate, scale)
    return scale, best
