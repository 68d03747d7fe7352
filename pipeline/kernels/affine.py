"""Exact searches over the codes of affine grids ``v = s q + m``, one block per row.

With ``u = 1/s`` and ``z = -m/s`` a code is ``q_i = floor(u w_i + z + 1/2)``, clipped: every code
vector is a cell of the arrangement of the lines ``u w_i + z = k + 1/2`` in the half-plane u > 0,
and a walk along a straight line in that plane meets its cells one changed code at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.device import gpu_form
from pipeline.quantization.formats import ScaleLattice

LEAST_CURVATURE = 1e-11
"""Share of the metric's trace below which codes count as all equal, so that no scale fits them."""


def affine_lines(
    weights: Tensor,
    metric: Tensor,
    linear: Tensor,
    levels: int,
    lines: Tensor,
    anchors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Best codes of every row among the cells that its lines pass through.

    Scale and offset are the best for each cell. Eliminating the offset leaves the metric
    ``M - M11'M / 1'M1`` and the linear term b reduced alike, in which the objective is
    ``-(q'b)^2 / q'Mq`` as for one scale; both are updated at each crossing as in Piecewise Scale
    Optimization (arXiv 2606.10890, Algorithm 1). Sweeping z at a fixed u is the event sweep of
    NeUQI (arXiv 2505.17595), here with a dense metric.

    Args:
        weights: Values that are rounded, [rows, inputs].
        metric: M, symmetric positive definite, [inputs, inputs].
        linear: b, [rows, inputs].
        levels: Number of codes, ``0 .. levels-1``.
        lines: Start (u, z) and direction (du, dz) of each walk, [rows, n, 4]; walks have no end.
        anchors: For walks along the very line of an input's threshold, that input; its code is
            taken on both sides. -1 elsewhere. int64 [rows, n].

    Returns:
        What the best scale gains over the best offset alone, float64 [rows], and the codes, int64
        [rows, inputs]. The gain is 0 and the codes too where no positive scale helps.
    """
    w, M, b = (t.double().contiguous() for t in (weights, metric, linear))
    column, total = M.sum(1), M.sum()
    reduced = M - torch.outer(column, column) / total
    b = b - b.sum(1, keepdim=True) * column / total
    least = LEAST_CURVATURE * float(M.diagonal().sum())
    at = torch.full(lines.shape[:2], -1, device=w.device) if anchors is None else anchors
    at, paths, top = at.long().contiguous(), lines.double().contiguous(), float(levels - 1)
    if w.device.type != "cpu":
        form = gpu_form("affine", w)
        gains, codes = form.affine_lines(w, reduced, b, top, paths, at, least)
        return gains, codes.long()
    from pipeline.kernels.cpu import affine as compiled

    arrays = (w.numpy(), reduced.numpy(), b.numpy(), top, paths.numpy(), at.numpy())
    found = compiled.affine_lines(*arrays, least)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1]).long()


def affine_offsets(
    weights: Tensor,
    metric: Tensor,
    linear: Tensor,
    levels: int,
    scales: Tensor,
    lattice: ScaleLattice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact best offset on a lattice, and codes, at each of the given scales of a row.

    For every code vector that rounding reaches at a scale with some offset, the objective is a
    parabola in m, so its best lattice point is one of the neighbours of the vertex.

    Args:
        weights: Values that are rounded, [rows, inputs].
        metric: M, symmetric positive definite, [inputs, inputs].
        linear: b, [rows, inputs].
        levels: Number of codes, ``0 .. levels-1``.
        scales: Candidates, [rows, n]; may be negative, or 0 for an offset alone.
        lattice: Storage lattice of the offset.

    Returns:
        Best candidate, its offset, both float64 [rows]; codes, int64 [rows, inputs]; and the
        objective ``v'Mv - 2 v'b``, float64 [rows].
    """
    w, M, b, s = (t.double().contiguous() for t in (weights, metric, linear, scales))
    least = -lattice.max_value if lattice.signed else 0.0
    limits = (lattice.significand_bits, lattice.min_step_exponent, least, lattice.max_value)
    top = float(levels - 1)
    if w.device.type != "cpu":
        form = gpu_form("affine", w)
        scale, offset, codes, objective = form.affine_offsets(w, M, b, top, s, *limits)
        return scale, offset, codes.long(), objective
    from pipeline.kernels.cpu import affine as compiled

    out = compiled.affine_offsets(w.numpy(), M.numpy(), b.numpy(), top, s.numpy(), *limits)
    scale, offset, codes, objective = (torch.from_numpy(a) for a in out)
    return scale, offset, codes.long(), objective
