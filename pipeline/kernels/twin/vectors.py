"""Rounding to a codebook in plain PyTorch, on any device.

The contract is in `pipeline.kernels.vectors`. The nearest entry is found place by place, all rows
at once: every prefix that costs less than an entry already known is kept, so that the search is
exact. That entry comes from the same search with only the cheapest few prefixes of a row kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ANY = -1
"""Stands for a parity where any will do."""

BEAM = 16
"""Prefixes of a row that are kept to find a first entry."""

ROWS_AT_ONCE = 1024
"""Rows that are searched together, which bounds memory."""

LEAST_GAIN = 1e-12
"""Relative decrease below which another entry is a rounding error."""

Blocks = tuple[Tensor, Tensor, Tensor, Tensor]
"""Roots and inverses of the metric's blocks of a unit, and of an entry if a unit has two."""


@dataclass(frozen=True)
class Book:
    """The codebook.

    Attributes:
        children: Prefix tree, see `Codebook.children`.
        levels: Sorted levels at scale 1, the negative ones first.
        places: Weights of an entry.
        unit: Weights that are chosen together: one entry or two.
        even: The number of negative weights of a unit is even.
    """

    children: Tensor
    levels: Tensor
    places: int
    unit: int
    even: bool

    def follow(self, nodes: Tensor) -> Tensor:
        """Next node of each prefix for every level, -1 for none, [prefixes, levels]."""
        onwards = self.children[nodes]
        return torch.cat([onwards.flip(1), onwards], dim=1)


def search(
    targets: Tensor, pull: Tensor, root: Tensor, parity: Tensor, book: Book, bound: Tensor
) -> tuple[Tensor, Tensor]:
    """The entry q of least ``|(t - q) R + p|^2`` for every row, if it is below the bound.

    Args:
        targets: t, [rows, places].
        pull: p, [rows, places].
        root: R, upper triangular, [places, places].
        parity: Parity of the number of negative weights, or `ANY`, [rows].
        book: The codebook.
        bound: Loss that must be undercut, [rows].

    Returns:
        Losses [rows], infinite where no entry is below the bound, and level indices
        [rows, places].
    """
    parts = []
    for part in torch.arange(len(targets), device=targets.device).split(ROWS_AT_ONCE):
        given = targets[part], pull[part], root, parity[part], book
        first, codes = _prefixes(*given, bound[part], BEAM)
        loss, better = _prefixes(*given, torch.minimum(first, bound[part]), None)
        found = torch.where((loss < first)[:, None], better, codes)
        parts.append((torch.minimum(loss, first), found))
    losses, found_codes = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(found_codes)


def _prefixes(
    t: Tensor,
    p: Tensor,
    root: Tensor,
    parity: Tensor,
    book: Book,
    bound: Tensor,
    beam: int | None,
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(t), device=t.device)
    nodes, negative = torch.zeros_like(rows), torch.zeros_like(rows)
    cost, codes = t.new_zeros(len(t)), rows.new_zeros(len(t), 0)
    sign = (book.levels < 0).long()
    for place in range(book.places):
        difference = t[rows, :place] - book.levels[codes]
        lean = p[rows, place] + difference @ root[:place, place]
        error = (t[rows, place, None] - book.levels) * root[place, place] + lean[:, None]
        total = cost[:, None] + error.square()
        onwards = book.follow(nodes)
        usable = (onwards >= 0) & (total < bound[rows, None])
        signs = negative[:, None] + sign
        if place == book.places - 1:
            asked = parity[rows, None]
            usable &= (signs % 2 == asked) | (asked == ANY)
        prefix, level = usable.nonzero(as_tuple=True)
        if beam is not None:
            keep = _cheapest(rows[prefix], total[prefix, level], beam)
            prefix, level = prefix[keep], level[keep]
        cost = total[prefix, level]
        codes = torch.cat([codes[prefix], level[:, None]], dim=1)
        nodes, negative = onwards[prefix, level], signs[prefix, level]
        rows = rows[prefix]
    keep = _cheapest(rows, cost, 1)
    losses = torch.full_like(t[:, 0], torch.inf)
    found = codes.new_zeros(len(t), book.places)
    losses[rows[keep]], found[rows[keep]] = cost[keep], codes[keep]
    return losses, found


def _cheapest(rows: Tensor, cost: Tensor, count: int) -> Tensor:
    """Places of the `count` cheapest entries of every row."""
    order = torch.argsort(cost, stable=True)
    order = order[torch.argsort(rows[order], stable=True)]
    ordered = rows[order]
    first = torch.searchsorted(ordered, ordered)
    return order[torch.arange(len(order), device=order.device) - first < count]


def _unit(
    targets: Tensor, pull: Tensor, root: Tensor, book: Book, bound: Tensor
) -> tuple[Tensor, Tensor]:
    """An entry, or two under each parity that they can share."""
    any_of = torch.full_like(bound, ANY, dtype=torch.int64)
    if book.places == book.unit:
        return search(targets, pull, root, any_of + book.even, book, bound)
    front, back = slice(0, book.places), slice(book.places, book.unit)
    best = torch.full_like(bound, torch.inf)
    codes = torch.zeros(targets.shape, dtype=torch.int64, device=bound.device)
    for n in range(2):
        parity = any_of + 1 + n
        most = torch.minimum(best, bound)
        cost, first = search(
            targets[:, front], pull[:, front], root[front, front], parity, book, most
        )
        step = targets[:, front] - book.levels[first]
        lean = pull[:, back] + step @ root[front, back]
        left = torch.where(cost < most, most - cost, 0.0)
        more, second = search(targets[:, back], lean, root[back, back], parity, book, left)
        better = (more < left)[:, None]
        best = torch.where(better[:, 0], cost + more, best)
        codes = torch.where(better, torch.cat([first, second], dim=1), codes)
    return best, codes


def _round(
    x: Tensor, root: Tensor, scale: Tensor, book: Book, bound: Tensor
) -> tuple[Tensor, Tensor]:
    """Units one after the other, errors fed back; infinite losses where not below the bound."""
    zero, used = scale == 0, torch.where(scale == 0, 1.0, scale)
    most = torch.where(zero, torch.inf, bound)
    difference = torch.zeros_like(x)
    codes = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    loss = torch.zeros_like(scale)
    for at in range(0, x.shape[1], book.unit):
        part = slice(at, at + book.unit)
        pull = torch.where(zero, 0.0, 1.0)[:, None] * (difference[:, :at] @ root[:at, part])
        targets = torch.where(zero, 0.0, 1.0)[:, None] * x[:, part]
        pull, targets = pull / used[:, None], targets / used[:, None]
        left = (most - loss) / used.square()
        cost, codes[:, part] = _unit(targets, pull, root[part, part], book, left)
        difference[:, part] = x[:, part] - scale[:, None] * book.levels[codes[:, part]]
        loss = loss + used.square() * cost
    return torch.where(zero, (x @ root).square().sum(1), loss), codes


def _polish(
    x: Tensor,
    metric: Tensor,
    blocks: Blocks,
    scale: Tensor,
    book: Book,
    sweeps: int,
    codes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Descent over units, and over the halves of a unit of two entries."""
    own, inverse, half_own, half_inverse = blocks
    codes = codes.clone()
    difference = x - scale[:, None] * book.levels[codes]
    gradient = difference @ metric
    state = (codes, difference, gradient, metric)
    halves = len(half_own) // len(own)
    for _ in range(sweeps):
        before = codes.clone()
        for b in range(len(own)):
            _improve(b * book.unit, own[b], inverse[b], None, scale, book, state)
            for h in range(b * halves, (b + 1) * halves):
                at = h * book.places
                signs = codes[:, at : at + book.places] < len(book.levels) // 2
                _improve(at, half_own[h], half_inverse[h], signs.sum(1) % 2, scale, book, state)
        if torch.equal(before, codes):
            break
    return (difference * gradient).sum(1), codes


def _improve(
    at: int,
    own: Tensor,
    inverse: Tensor,
    parity: Tensor | None,
    scale: Tensor,
    book: Book,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Best entry (unit without a parity) at one place with all others held."""
    codes, difference, gradient, metric = state
    part, used = slice(at, at + len(own)), torch.where(scale == 0, 1.0, scale)
    shift = gradient[:, part] @ inverse
    targets = book.levels[codes[:, part]] + shift / used[:, None]
    bound = (shift * gradient[:, part]).sum(1) * (1 - LEAST_GAIN) / used.square()
    bound = torch.where(scale == 0, 0.0, bound)
    nothing = torch.zeros_like(targets)
    if parity is None:
        cost, found = _unit(targets, nothing, own, book, bound)
    else:
        cost, found = search(targets, nothing, own, parity, book, bound)
    better = torch.where((cost < bound)[:, None], found, codes[:, part])
    step = scale[:, None] * (book.levels[better] - book.levels[codes[:, part]])
    codes[:, part] = better
    difference[:, part] -= step
    gradient -= step @ metric[part]


def fit_vectors(
    weights: Tensor,
    metric: Tensor,
    root: Tensor,
    blocks: Blocks,
    scales: Tensor,
    start_scale: Tensor,
    start_codes: Tensor,
    given: bool,
    book: Book,
    sweeps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `pipeline.kernels.fit_vectors`."""
    best = torch.full_like(weights[:, 0], torch.inf)
    codes, scale = start_codes, start_scale
    count = scales.shape[1]
    chosen = torch.full(best.shape, count if given else -1, device=best.device)
    if given:
        best, codes = _polish(weights, metric, blocks, scale, book, sweeps, codes)
    for k in range(count):
        loss, found = _round(weights, root, scales[:, k], book, best)
        better = loss < best
        best, chosen = torch.where(better, loss, best), torch.where(better, k, chosen)
        codes = torch.where(better[:, None], found, codes)
        scale = torch.where(better, scales[:, k], scale)
    loss, found = _polish(weights, metric, blocks, scale, book, sweeps, codes)
    fresh = (chosen >= 0) & (chosen < count)
    best, codes = torch.where(fresh, loss, best), torch.where(fresh[:, None], found, codes)
    return chosen, codes, best
