"""Affine codes along lines in plain PyTorch, on any device.

The contracts are in `pipeline.kernels.affine`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _cells(
    weights: Tensor, metric: Tensor, top: float, lines: Tensor, anchors: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Codes q and ``q @ M``, both [rows, inputs], after every crossing along one line per row, and
    where the next crossing does not coincide with it, [rows].
    """
    rows, width = weights.shape
    place = lines[:, :1] * weights + lines[:, 1:2] + 0.5
    speed = lines[:, 2:3] * weights + lines[:, 3:4]
    later = torch.arange(width, device=weights.device) > anchors[:, None]
    after = (anchors[:, None] >= 0) & later
    codes = torch.floor(place)
    # On a threshold the direction decides; parallel to it, the order of the columns does.
    down = (codes == place) & ((speed < 0) | ((speed == 0) & after))
    codes = (codes - down.double()).clamp(0, top)
    level = torch.arange(1, int(top) + 1, dtype=weights.dtype, device=weights.device)
    rising = (speed > 0)[:, :, None] & (level > codes[:, :, None])
    falling = (speed < 0)[:, :, None] & (level <= codes[:, :, None])
    divisor = torch.where(speed == 0, 1.0, speed)[:, :, None]
    times = torch.where(rising | falling, (level - place[:, :, None]) / divisor, torch.inf)
    times, order = times.reshape(rows, -1).sort(dim=1, stable=True)
    steps = (rising.double() - falling.double()).reshape(rows, -1).gather(1, order)
    columns = order // int(top)
    gradient = codes @ metric
    yield codes, gradient, torch.ones_like(later[:, 0])
    every = torch.arange(rows, device=weights.device)
    never = torch.full_like(place[:, 0], torch.inf)
    for n in range(int((steps != 0).sum(1).max())):
        i, step = columns[:, n], steps[:, n]
        codes = codes.clone()
        codes[every, i] += step
        gradient = gradient + step[:, None] * metric[i]
        following = times[:, n + 1] if n + 1 < times.shape[1] else never
        yield codes, gradient, (following > times[:, n]) | following.isinf()


def affine_lines(
    weights: Tensor,
    metric: Tensor,
    linear: Tensor,
    top: float,
    lines: Tensor,
    anchors: Tensor,
    least: float,
) -> tuple[Tensor, Tensor]:
    """See `pipeline.kernels.affine_lines`; `metric` and `linear` are reduced, codes are floats."""
    rows, count = lines.shape[:2]
    w, b = weights.repeat_interleave(count, dim=0), linear.repeat_interleave(count, dim=0)
    at = anchors.reshape(-1)
    anchor = at.clamp_min(0)[:, None]
    pull, weight = b.gather(1, anchor)[:, 0], metric.diagonal()[anchor[:, 0]]
    best, kept = torch.zeros_like(pull), torch.zeros_like(w)
    for codes, gradient, settled in _cells(w, metric, top, lines.reshape(-1, 4), at):
        alpha, beta = (codes * b).sum(1), (codes * gradient).sum(1)
        lower = codes.scatter_add(1, anchor, -torch.ones_like(codes[:, :1]))
        other = beta - 2 * gradient.gather(1, anchor)[:, 0] + weight
        anchored = at >= 0
        for q, a, c, valid in (
            (codes, alpha, beta, settled),
            (lower, alpha - pull, other, settled & anchored),
        ):
            gain = a * a / torch.where(c > least, c, 1.0)
            better = valid & (c > least) & (a > 0) & (gain > best)
            best = torch.where(better, gain, best)
            kept = torch.where(better[:, None], q, kept)
    value, line = best.reshape(rows, count).max(1)
    every = torch.arange(rows, device=w.device)
    return value, kept.reshape(rows, count, -1)[every, line]


def affine_offsets(
    weights: Tensor,
    metric: Tensor,
    linear: Tensor,
    top: float,
    scales: Tensor,
    bits: int,
    min_exponent: int,
    lowest: float,
    largest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.affine_offsets`; codes are floats."""
    rows, count = scales.shape
    w, b = weights.repeat_interleave(count, dim=0), linear.repeat_interleave(count, dim=0)
    s = scales.reshape(-1)
    u = torch.where(s == 0, 0.0, 1 / torch.where(s == 0, 1.0, s))
    start = -torch.maximum(u * w.amax(1), u * w.amin(1)) - 1
    lines = torch.stack([u, start, torch.zeros_like(u), (s != 0).double()], dim=1)
    column, total = metric.sum(1), metric.sum()
    best, offset = torch.full_like(s, torch.inf), torch.zeros_like(s)
    kept = torch.zeros_like(w)
    for codes, gradient, settled in _cells(w, metric, top, lines, torch.full_like(s, -1).long()):
        fixed = s * (s * (codes * gradient).sum(1) - 2 * (codes * b).sum(1))
        pull = b.sum(1) - s * (codes @ column)
        wanted = (pull / total).clamp(lowest, largest)
        _, exponent = torch.frexp(wanted.abs())
        step = torch.ldexp(torch.ones_like(s), (exponent - bits).clamp_min(min_exponent))
        for m in (torch.floor(wanted / step) * step, torch.ceil(wanted / step) * step):
            m = m.clamp(lowest, largest)
            value = fixed + m * (m * total - 2 * pull)
            better = settled & (value < best)
            best, offset = torch.where(better, value, best), torch.where(better, m, offset)
            kept = torch.where(better[:, None], codes, kept)
    value, n = best.reshape(rows, count).min(1)
    every = torch.arange(rows, device=w.device)
    at = every * count + n
    return s[at], offset[at], kept[at], value
