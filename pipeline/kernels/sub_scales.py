"""Sub-scale, sub-offset and codes of one group under given super-scales."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.device import gpu_form


class SubScales(NamedTuple):
    """What was found for every row.

    Attributes:
        scales: Sub-scales, int64 [rows].
        offsets: Sub-offsets, int64 [rows].
        level_indices: int64 [rows, group].
        objective: ``v'Mv - 2 v'c``, float64 [rows].
    """

    scales: Tensor
    offsets: Tensor
    level_indices: Tensor
    objective: Tensor


def fit_sub_scales(
    weights: Tensor,
    metric: Tensor,
    linear: Tensor,
    supers: tuple[Tensor, Tensor],
    start: tuple[Tensor, Tensor, Tensor | None],
    levels: Tensor,
    ranges: tuple[tuple[int, int], tuple[int, int]],
    *,
    reach: int,
    sweeps: int,
) -> SubScales:
    """Choose integers of one group for ``v = d sc level - dmin mn`` that make v'Mv - 2 v'c small.

    All pairs within `reach` of the start are tried, weights rounded to nearest under each. From the
    best of them, and from the given codes if there are any, two exact steps alternate: coordinate
    descent on the codes, and the best of *all* pairs for fixed codes (for each sub-scale the
    objective is a parabola in the sub-offset, so its best integer is next to the vertex).

    Args:
        weights: What is rounded, [rows, group].
        metric: M, symmetric positive definite, [group, group].
        linear: c, [rows, group].
        supers: Super-scales d and super-offsets dmin, each [rows], of any sign; zeros in dmin for
            formats without offsets.
        start: Sub-scales and sub-offsets to start from, int64 [rows], and level indices, int64
            [rows, group], or None. The result is never worse than given indices.
        levels: Sorted levels at scale 1, [levels].
        ranges: Inclusive ranges of sub-scales and sub-offsets.
        reach: Steps around the start.
        sweeps: Most alternations.
    """
    w, M, c, grid = (t.double().contiguous() for t in (weights, metric, linear, levels))
    d, dmin = (t.double().contiguous() for t in supers)
    sc, mn, indices = start
    given = indices is not None
    if indices is None:
        indices = torch.zeros(w.shape, dtype=torch.int64, device=w.device)
    sc, mn, indices = (t.long().contiguous() for t in (sc, mn, indices))
    if w.device.type != "cpu":
        form = gpu_form("sub_scales", w)
        return SubScales(
            *form.fit_sub_scales(
                w, M, c, d, dmin, sc, mn, indices, given, grid, *ranges, reach, sweeps
            )
        )
    from pipeline.kernels.cpu import sub_scales as compiled

    arrays = (t.numpy() for t in (w, M, c, d, dmin, sc, mn, indices))
    limits = (*ranges[0], *ranges[1])
    found = compiled.fit_sub_scales(*arrays, given, grid.numpy(), limits, reach, sweeps)
    return SubScales(*(torch.from_numpy(a) for a in found))
