"""Scale and codebook entries of one group, in the metric of its loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.quantization.formats import Format


class FittedVectors(NamedTuple):
    """What was found for every row.

    Attributes:
        chosen: Place of the scale among the candidates, int64 [rows]; their number for the start.
        level_indices: int64 [rows, group].
        loss: ``(x - v)' M (x - v)``, float64 [rows].
    """

    chosen: Tensor
    level_indices: Tensor
    loss: Tensor


def fit_vectors(
    weights: Tensor,
    metric: Tensor,
    scales: Tensor,
    fmt: Format,
    *,
    start: tuple[Tensor, Tensor] | None = None,
    sweeps: int,
) -> FittedVectors:
    """Find entries of the codebook, and one of some scales, that make the loss of a group small.

    Under each scale the entries are rounded one after the other, the error of each compensated on
    those to come: with the upper root R of the metric, ``M = R R'``, the loss is ``|(x - v) R|^2``,
    whose first terms depend on the first entry alone, and so on. Each entry is the exact minimum of
    its terms over the whole codebook and all signs. Where an even number of negative signs ties two
    entries together, they are rounded once with an even number each and once with an odd one, and
    the better pair is taken.

    The codes of the best scale are then improved by coordinate descent, one entry at a time the
    exact minimum with the others held. Codes that are given are improved so before anything else:
    only a scale that loses less than they do is of interest.

    Args:
        weights: x, [rows, group].
        metric: M, symmetric positive definite, [group, group].
        scales: Scales to try, not negative, [rows, candidates].
        fmt: Format with a codebook.
        start: Scale [rows] and level indices [rows, group] to start from as well; the result is
            never worse than these.
        sweeps: Most passes of the descent.

    Raises:
        ValueError: The format has no codebook, or the group is not a whole number of vectors.
    """
    codebook = fmt.codebook
    if codebook is None or weights.shape[1] % codebook.unit:
        raise ValueError(f"{fmt.name} has no vectors for groups of {weights.shape[1]}")
    x, M, tried = (t.double().contiguous() for t in (weights, metric, scales))
    halves = codebook.places if codebook.places < codebook.unit else len(M)
    blocks = (*_blocks(M, codebook.unit), *_blocks(M[: len(M) if halves < len(M) else 0], halves))
    scale, codes = start or (x.new_zeros(len(x)), torch.zeros_like(x))
    first = scale.double().contiguous(), codes.long().contiguous(), start is not None
    children, levels = codebook.children.to(x.device), fmt.grid.to(x.device)
    book = (children, levels, codebook.places, codebook.unit, codebook.even)
    if x.device.type != "cpu":
        from pipeline.kernels.twin import vectors as twin

        return FittedVectors(
            *twin.fit_vectors(x, M, upper_root(M), blocks, tried, *first, twin.Book(*book), sweeps)
        )
    from pipeline.kernels.cpu import vectors as compiled

    arrays = x.numpy(), M.numpy(), upper_root(M).numpy()
    found = compiled.fit_vectors(
        *arrays,
        tuple(t.numpy() for t in blocks),
        tried.numpy(),
        first[0].numpy(),
        first[1].numpy(),
        first[2],
        (children.numpy(), levels.numpy(), *book[2:]),
        sweeps,
    )
    return FittedVectors(*(torch.from_numpy(a) for a in found))


def upper_root(metric: Tensor) -> Tensor:
    """Upper triangular R with ``M = R R'``, [..., n, n], from the lower root read backwards."""
    backwards = metric.flip(-1, -2)
    return torch.linalg.cholesky(backwards).flip(-1, -2).contiguous()


def _blocks(metric: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Upper roots and inverses of the diagonal blocks, each [blocks, size, size]."""
    places = range(0, len(metric), size)
    if not len(metric):
        return (metric.new_zeros(0, size, size),) * 2
    diagonal = torch.stack([metric[at : at + size, at : at + size] for at in places])
    return upper_root(diagonal), torch.cholesky_inverse(torch.linalg.cholesky(diagonal))
