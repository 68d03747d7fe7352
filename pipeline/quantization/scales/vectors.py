"""Scales of codebook formats: every candidate is judged by the vectors that it leads to.

A codebook has no levels that could be swept or refitted one by one, so that a group's scale is
chosen by rounding the whole group under each of some scales, in the metric of its loss
(`pipeline.kernels.fit_vectors`). As with other sub-scales, the groups of a super-group are first
fitted alone, the super-scale is the one under which the nearest sub-scales lose least, and then
sub-scales and vectors are chosen together, group by group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels import fit_vectors
from pipeline.quantization.formats import Format
from pipeline.quantization.scales.base import BlockProblem

FREE_SCALES = 6
"""Free scales that are tried for a group on its own."""

SPREAD = (0.6, 1.5)
"""Their range, in units of the scale at which weights and codebook have the same mean square."""

FINE = (0.93, 1.0, 1.07)
"""What is tried next, in units of the scale refitted to the best vectors."""

REACH = 2
"""Sub-scales to each side that are tried for a group."""

SWEEPS = 4
"""Most passes of the descent over the vectors of a group."""


def centre(problem: BlockProblem) -> Tensor:
    """Where ``v' M v - 2 v' b`` is smallest, float64 [rows, block]."""
    weights, metric = problem.weights.double(), problem.metric.double()
    if problem.linear is None:
        return weights
    gradient = problem.linear.double() - weights @ metric
    return weights + torch.linalg.solve(metric, gradient.T).T


def free_scale(problem: BlockProblem, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale of one group on its own, off any lattice, and the curvature of its loss, each [rows].

    Args:
        problem: The group.
        fmt: Format with a codebook.
    """
    x, M = centre(problem), problem.metric.double()
    levels = fmt.grid.to(x.device)
    start = (x.square().mean(1) / _mean_square(fmt)).sqrt()
    low, high = torch.tensor(SPREAD, dtype=x.dtype).log().tolist()
    factors = torch.linspace(low, high, FREE_SCALES, dtype=x.dtype, device=x.device).exp()
    fine = torch.tensor(FINE, dtype=x.dtype, device=x.device)
    for step in (factors, fine):
        found = fit_vectors(x, M, start[:, None] * step, fmt, sweeps=0)
        q = levels[found.level_indices]
        product = q @ M
        curvature = (q * product).sum(1)
        start = ((product * x).sum(1) / curvature).clamp_min(0)
    return start, curvature


def _mean_square(fmt: Format) -> float:
    """Of the magnitudes of all entries, in levels."""
    if fmt.codebook is None:
        raise ValueError(f"{fmt.name} has no codebook")
    half = len(fmt.levels) // 2
    return float(fmt.grid[half + fmt.codebook.entries].square().mean())


def choose_vectors(
    problem: BlockProblem, unit: Tensor, sub_scale: Tensor, fmt: Format
) -> tuple[Tensor, Tensor]:
    """Sub-scale and vectors of one group under its super-scale.

    Args:
        problem: The group.
        unit: Super-scales, [rows].
        sub_scale: Where to look, int64 [rows].
        fmt: Format with a codebook.

    Returns:
        Sub-scales, int64 [rows], and level indices, int64 [rows, group].
    """
    tried = neighbours(sub_scale, fmt)
    scales = unit.double()[:, None] * tried
    found = fit_vectors(centre(problem), problem.metric, scales, fmt, sweeps=SWEEPS)
    return tried.gather(1, found.chosen[:, None])[:, 0], found.level_indices


def round_vectors(problem: BlockProblem, scale: Tensor, fmt: Format) -> Tensor:
    """Vectors of one group under a given scale [rows], as level indices, int64 [rows, group]."""
    scales = scale.double()[:, None]
    return fit_vectors(centre(problem), problem.metric, scales, fmt, sweeps=SWEEPS).level_indices


def neighbours(sub_scale: Tensor, fmt: Format) -> Tensor:
    """Sub-scales [rows] and those within `REACH` around them, nearest first, int64 [rows, n]."""
    low, high = fmt.sub_scale or (1, 1)
    steps = sorted(range(-REACH, REACH + 1), key=abs)
    offsets = torch.tensor(steps, device=sub_scale.device) * fmt.sub_step
    return (sub_scale.long()[:, None] + offsets).clamp(low, high)
