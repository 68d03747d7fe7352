"""Scales chosen by the loss that sequential rounding of the group really ends with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels import round_columns, sequential_loss
from pipeline.quantization.formats import Format, ScaleLattice, stored_pair
from pipeline.quantization.scales.absmax import may_mirror, smallest_covering_scale
from pipeline.quantization.scales.base import BlockProblem, BlockScales
from pipeline.quantization.scales.piso import piso

RANGE_AT_4_LEVELS = 0.3
"""Natural logarithm of the largest factor on the PiSO scale, for 4 levels; it falls with more."""

SHIFT = 0.5
"""Largest move of the offset, in levels."""

POLISHES = 2
GOLDEN = 0.6180339887498949

Pairs = tuple[Tensor, Tensor]
"""Scales and offsets, [rows, n] each."""


def lookahead(
    problem: BlockProblem, fmt: Format, *, signed: bool = True, candidates: int = 16
) -> BlockScales:
    """Scale of one group by trying candidates in the sequential solver's own recursion.

    Rounding to nearest, which scale rules assume, is not what happens to a group inside GPTQ: each
    error is fed back to the columns after it. The candidates, spread around the PiSO scale and both
    covering ones, are judged by the exact in-group loss of that recursion
    (`pipeline.kernels.sequential_loss`), then as many more around the best one; last, the scale is
    refitted to the codes that the recursion gives, ``s = q'Mx / q'Mq`` with ``M = (U'U)^-1``, while
    that helps. Never worse than `piso` in the in-group loss. With an offset, scale and offset are
    spread and refitted together.

    Without a recursion (round to nearest), and for formats with sub-scales, this is `piso`.

    Args:
        problem: One group of every row, with `inverse_root`.
        fmt: Format of the group.
        signed: Allow negative scales where the format does.
        candidates: Size of each of the two rounds.

    Returns:
        Scales without codes: the solver finds those as it goes.
    """
    start = piso(problem, fmt, signed=signed)
    if problem.inverse_root is None or fmt.sub_scale is not None:
        return start
    search = _Search(
        problem.weights.double(),
        problem.inverse_root.double(),
        fmt.grid.to(problem.weights.device),
        fmt,
    )
    reach = RANGE_AT_4_LEVELS * (4 / len(fmt.levels)) ** 0.6
    best = start.scale.double(), start.offset.double()
    mirror = may_mirror(fmt, signed) and fmt.scale_lattice.signed and not fmt.affine
    known = [best, *search.neighbours(best), *search.covering(mirror)]
    opposite = candidates // 4 if mirror else 0
    known.append(search.around(best, candidates - opposite, reach, SHIFT))
    known.append(search.around((-best[0], best[1]), opposite, reach, SHIFT))
    best, loss = search.best(known)
    finer = 3 / candidates
    best, loss = search.improved(
        best, loss, search.around(best, candidates, reach * finer, SHIFT * finer)
    )
    for _ in range(POLISHES):
        best, loss = search.improved(best, loss, search.refitted(best))
    scale, offset = (t.to(problem.weights.dtype) for t in best)
    fields = {"d": scale.float()} | ({"m": offset.float()} if fmt.affine else {})
    return BlockScales(scale, offset, fields)


@dataclass(frozen=True)
class _Search:
    """One group of every row, and where its scales and offsets can lie.

    Attributes:
        weights: x, [rows, group].
        factor: U of the group.
        levels: Levels at scale 1.
        fmt: Format.
    """

    weights: Tensor
    factor: Tensor
    levels: Tensor
    fmt: Format

    @property
    def lattice(self) -> ScaleLattice:
        """Storage lattice."""
        return self.fmt.scale_lattice

    @property
    def affine(self) -> bool:
        """Whether there is an offset."""
        return self.fmt.affine

    def best(self, known: list[Pairs]) -> tuple[Pairs, Tensor]:
        """Best pair of every row and its loss, all [rows, 1]; the first of equals."""
        scale, offset = (torch.cat([pairs[n] for pairs in known], dim=1) for n in (0, 1))
        loss = sequential_loss(self.weights, self.factor, scale, self.levels, offset)
        least, at = loss.min(1, keepdim=True)
        return (scale.gather(1, at), offset.gather(1, at)), least

    def improved(self, best: Pairs, loss: Tensor, others: Pairs) -> tuple[Pairs, Tensor]:
        """The better of a pair and the best of some others."""
        found, least = self.best([others])
        scale, offset = (torch.where(least < loss, n, o) for n, o in zip(found, best, strict=True))
        return (scale, offset), torch.minimum(least, loss)

    def around(self, best: Pairs, count: int, reach: float, shift: float) -> Pairs:
        """Pairs whose scales spread over ``exp(-reach) .. exp(reach)`` times the best one.

        With an offset, the middle of the range also moves by up to `shift` levels, over the points
        of a Kronecker sequence.
        """
        scale, offset = best
        place = (torch.arange(count, dtype=scale.dtype, device=scale.device) + 0.5) / max(count, 1)
        factor = torch.exp(reach * (2 * place - 1))
        wanted = scale * factor
        if not self.affine:
            return self.lattice.round(wanted), torch.zeros_like(wanted)
        turn = torch.arange(count, dtype=scale.dtype, device=scale.device) * GOLDEN % 1.0
        middle = offset + scale * self.levels.mean()
        moved = middle + scale * shift * (2 * turn - 1) - wanted * self.levels.mean()
        return stored_pair(self.fmt, wanted, moved)

    def neighbours(self, best: Pairs) -> list[Pairs]:
        """The next lattice scales below and above, which coarse lattices need."""
        scale, offset = best
        size, sign = scale.abs(), scale.sign()
        below = sign * self.lattice.neighbours(size * (1 - 2**-20))[0]
        above = sign * self.lattice.neighbours(size * (1 + 2**-20))[1]
        if not self.fmt.scaled_offsets:
            return [(below, offset), (above, offset)]
        return [stored_pair(self.fmt, below, offset), stored_pair(self.fmt, above, offset)]

    def covering(self, mirror: bool) -> list[Pairs]:
        """The scales at which no weight is clipped, of both signs where `mirror`."""
        if self.affine:
            return []
        found = []
        for sign in (1, -1) if mirror else (1,):
            scale = sign * smallest_covering_scale(sign * self.weights, self.levels, signed=False)
            found.append((self.lattice.round(scale[:, None]), torch.zeros_like(scale[:, None])))
        return found

    def refitted(self, best: Pairs) -> Pairs:
        """Lattice pairs nearest to the least-squares fit of the codes that `best` leads to."""
        scale, offset = best
        width = self.weights.shape[1]
        indices, _ = round_columns(self.weights, self.factor, scale, offset, self.levels, width)
        # Under a solve with U', the metric (U'U)^-1 becomes the identity.
        q, x, one = (
            torch.linalg.solve_triangular(self.factor.T, t.T, upper=False).T
            for t in (self.levels[indices], self.weights, torch.ones_like(self.weights[:1]))
        )
        if not self.affine:
            one = torch.zeros_like(one)
        total = one.square().sum().clamp_min(1e-300)
        pull, lean = x @ one.T / total, q @ one.T / total
        x, q = x - pull * one, q - lean * one
        power = q.square().sum(1, keepdim=True)
        fitted = torch.where(power > 0, (q * x).sum(1, keepdim=True) / power, scale)
        scales = torch.cat(self.lattice.neighbours(fitted), dim=1)
        return stored_pair(self.fmt, scales, pull - scales * lean)
