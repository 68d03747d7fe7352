"""The PiSO sweep of rows too wide for an update of ``H q`` at every event.

The order of the events does not depend on H. They are sorted once and taken in chunks: at the start
of a chunk ``H q`` of all rows is one matrix product, and inside it the sums of the objective follow
from the entries of H between the chunk's own events. All intervals of a chunk are scored at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.gpu.common import best_in_interval, on_device_of

CHUNK = 256
SLICE = 16
EVENTS_AT_ONCE = 1 << 26
"""Bounds the memory of the sort, about 50 bytes an event."""


@triton.jit
def _load_events(  # type: ignore[no-untyped-def]
    n, first, positions, events, weights, deltas, total, SIDE: tl.constexpr
):
    """Column and change of level of the events before the states `n`; no change at the first."""
    exists = (n > first) & (n <= total)
    position = tl.load(positions + n - 1, mask=exists, other=0.0)
    event = tl.load(events + n - 1, mask=exists, other=0)
    column = event // SIDE
    upward = tl.load(weights + column) > 0
    delta = tl.load(deltas + tl.where(upward, 0, SIDE) + event % SIDE)
    return column.to(tl.int64), tl.where(exists & (position > 0), delta, 0.0)


@triton.jit
def _score_chunk(  # type: ignore[no-untyped-def]
    positions,
    events,
    weights,
    linear,
    gradient,
    hessian,
    deltas,
    alive,
    alphas,
    betas,
    best,
    best_scale,
    best_count,
    first,
    total,
    width,
    SIDE: tl.constexpr,
    CLAMP: tl.constexpr,
    BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    LARGEST: tl.constexpr,
    STATES: tl.constexpr,
    PART: tl.constexpr,
):
    """Best of one row's states ``first .. first + STATES - 1``; state n is after n events.

    `gradient`, `alphas` and `betas` hold the rows that are `alive` only.
    """
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(alive + place)
    positions += row * total
    events += row * total
    weights += row * width
    linear += row * width
    gradient += place * width
    n = first + tl.arange(0, STATES)
    column, delta = _load_events(n, first, positions, events, weights, deltas, total, SIDE)
    product = tl.load(gradient + column)
    for start in range(0, STATES, PART):
        m = first + start + tl.arange(0, PART)
        other, change = _load_events(m, first, positions, events, weights, deltas, total, SIDE)
        earlier = m[None, :] < n[:, None]
        pairs = column[:, None] * width + other[None, :]
        entries = tl.load(hessian + pairs, mask=earlier, other=0.0)
        product += tl.sum(entries * change[None, :], 1)
    diagonal = tl.load(hessian + column * width + column)
    alpha = tl.load(alphas + place) + tl.cumsum(delta * tl.load(linear + column), 0)
    beta = tl.load(betas + place) + tl.cumsum(delta * (2 * product + delta * diagonal), 0)
    low = tl.load(positions + n, mask=n < total, other=0.0)
    high = tl.load(positions + n - 1, mask=(n > 0) & (n <= total), other=0.0)
    high = tl.where(n == 0, float("inf"), high)
    value, scale = best_in_interval(alpha, beta, low, high, CLAMP, BITS, MIN_EXPONENT, LARGEST)
    least = tl.min(value, 0)
    if least < tl.load(best + row):
        count = tl.min(tl.where(value == least, n, 0x7FFFFFFF), 0)
        tl.store(best + row, least)
        tl.store(best_scale + row, tl.sum(tl.where(n == count, scale, 0.0), 0))
        tl.store(best_count + row, count)


@dataclass(frozen=True)
class _Crossings:
    """What a weight meets on its way outward, by its direction: upward first, then downward.

    Attributes:
        start: Level indices in the limit of large scales, [2].
        midpoints: [2, side], padded so that ``w / midpoint`` is 0.
        deltas: Changes of level, [2, side], padded with 0.
    """

    start: Tensor
    midpoints: Tensor
    deltas: Tensor

    @classmethod
    def of(cls, levels: Tensor) -> _Crossings:
        """The crossings of a grid of sorted levels, [levels]."""
        midpoints = (levels[:-1] + levels[1:]) / 2
        above, below = int((midpoints <= 0).sum()), int((midpoints < 0).sum())
        gaps = levels[1:] - levels[:-1]
        side = max(len(midpoints) - above, below, 1)
        table, deltas = levels.new_full((2, side), float("inf")), levels.new_zeros((2, side))
        table[1] = -float("inf")
        table[0, : len(midpoints) - above], table[1, :below] = (
            midpoints[above:],
            midpoints[:below].flip(0),
        )
        deltas[0, : len(midpoints) - above], deltas[1, :below] = gaps[above:], -gaps[:below].flip(0)
        return cls(torch.tensor([above, below], device=levels.device), table, deltas)


class _Bound:
    """Lower bounds of the objective below a scale; the proof is in `pipeline.kernels.sweep`."""

    def __init__(self, weights: Tensor, linear: Tensor, levels: Tensor, first: Tensor) -> None:
        outer = torch.where(weights < 0, levels[0], first)
        outer = torch.where(weights > 0, levels[-1], outer)
        self.slopes = torch.maximum(first * linear, outer * linear).clamp_min(0)
        self.linear, self.weights = linear.abs(), weights.abs()
        self.radius = torch.maximum(levels.diff().max() / 2, levels.abs().min())

    def hopeless(self, rows: Tensor, scale: Tensor, ceiling: Tensor, best: Tensor) -> Tensor:
        """Which of `rows` have no scale up to theirs with an objective below `best`."""
        s = scale[:, None]
        nearby = self.linear[rows] * (self.weights[rows] + s * self.radius)
        reach = torch.minimum(s * self.slopes[rows], nearby).sum(1) * (1 + 1e-9)
        bound = reach * (reach / ceiling[rows] - 2)
        return (reach < ceiling[rows]) & (bound >= best[rows] * (1 - 1e-9))


def sweep_wide(
    weights: Tensor,
    hessian: Tensor,
    linear: Tensor,
    levels: Tensor,
    mirror: bool,
    clamp: bool,
    bits: int,
    min_exponent: int,
    largest: float,
    ceiling: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best positive scale of every row, or with `mirror` the best negative one.

    Returns:
        Scales [rows], level indices [rows, inputs] and objective [rows] as `piso_sweep` does.
    """
    sign = -1.0 if mirror else 1.0
    crossings = _Crossings.of(levels)
    size = max(1, EVENTS_AT_ONCE // (weights.shape[1] * crossings.deltas.shape[1]))
    limits = (clamp, bits, min_exponent, largest)
    tops = torch.full_like(weights[:, 0], -1) if ceiling is None else ceiling
    parts = [
        _sweep_rows(sign * w, hessian, sign * b, levels, top, crossings, mirror, limits)
        for w, b, top in zip(*(t.split(size) for t in (weights, linear, tops)), strict=True)
    ]
    scales, indices, objective = (torch.cat(part) for part in zip(*parts, strict=True))
    return sign * scales, indices, objective


def _sort_events(weights: Tensor, crossings: _Crossings) -> tuple[Tensor, Tensor]:
    """Transition scales of every row, descending, 0 where there is none, and what crosses there.

    Shapes [rows, inputs * side]; an event is ``input * side + number of the midpoint``.
    """
    midpoints = crossings.midpoints[(weights < 0).long()]
    positions = (weights[:, :, None] / midpoints).reshape(len(weights), -1)
    del midpoints
    positions, order = positions.sort(dim=1, descending=True, stable=True)
    return positions, order.int()


def _sweep_rows(
    weights: Tensor,
    hessian: Tensor,
    linear: Tensor,
    levels: Tensor,
    ceiling: Tensor,
    crossings: _Crossings,
    mirror: bool,
    limits: tuple[bool, int, int, float],
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = weights.shape
    side = crossings.deltas.shape[1]
    positions, events = _sort_events(weights, crossings)
    # A zero weight between two levels takes the upper one; of mirrored levels, the lower one.
    down = (weights < 0) | ((weights == 0) & mirror)
    start, step = crossings.start[down.long()], torch.where(weights < 0, -1, 1)
    bound = _Bound(weights, linear, levels, levels[start])
    best, best_scale = weights.new_zeros(rows), weights.new_zeros(rows)
    best_count = torch.zeros(rows, dtype=torch.int32, device=weights.device)
    crossed = torch.zeros(rows, width, dtype=torch.int32, device=weights.device)
    alive = torch.arange(rows, device=weights.device)
    first, total = 0, positions.shape[1]
    while len(alive):
        codes = levels[(start + step * crossed)[alive]]
        gradient = codes @ hessian
        alpha, beta = (codes * linear[alive]).sum(1), (codes * gradient).sum(1)
        with on_device_of(weights):
            _score_chunk[(len(alive),)](
                *(positions, events, weights, linear, gradient, hessian, crossings.deltas, alive),
                *(alpha, beta, best, best_scale, best_count, first, total, width),
                *(side, *limits, CHUNK, SLICE),
                num_warps=8,
                enable_fp_fusion=False,
            )
        window = slice(first, first + CHUNK)
        moved = (positions[:, window] > 0).int()
        crossed.scatter_add_(1, (events[:, window] // side).long(), moved)
        first += CHUNK
        if first > total:
            break
        scale = positions[alive, first - 1]
        hopeless = bound.hopeless(alive, scale, ceiling, best)
        alive = alive[(scale > 0) & ~hopeless]
    reached = (positions > 0) & (torch.arange(total, device=weights.device) < best_count[:, None])
    crossed = crossed.zero_().scatter_add_(1, (events // side).long(), reached.int())
    return best_scale, start + step * crossed, best
