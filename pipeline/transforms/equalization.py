"""Scale moved between the tensor that writes a channel and those that read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.architectures.spaces import Role, Space
from pipeline.transforms.model import Model, columns_of, rows_of
from pipeline.transforms.operators import Scaling
from pipeline.transforms.statistics import SITES, InputStatistics, channel_score, shared


def plan_equalization(model: Model, options: Mapping[str, Any]) -> None:
    """Rescale the channels of every space that is asked for."""
    spaces = model.asked_for(str(options["spaces"]).split("+"))
    alpha = options["alpha"]
    if options["method"] == "range":
        for space in spaces:
            written, read = rows_of(model, space), columns_of(model, space, "max")
            model.change(space, Scaling(range_factors(written, read, alpha)))
        return
    searches = options["method"] == "awq"
    for index, sites in model.measured(hessian=searches):
        for space in spaces:
            found = sites.get(SITES[space.kind])
            if space.block != index or found is None:
                continue
            if searches:
                factors = searched_factors(model, space, found, options["points"])
            else:
                inputs = channel_score(found, space, "max")
                factors = smooth_factors(inputs, columns_of(model, space, "max"), alpha)
            model.change(space, Scaling(factors))


def range_factors(written: Tensor, read: Tensor, alpha: float) -> Tensor:
    """Factors that equalize the ranges of weights, float64 [channels].

    With alpha 1/2 this is cross-layer equalization (Nagel et al., arXiv 1906.04721, equation 11): a
    channel that is written with range r1 and read with range r2 gets sqrt(r1 r2) on both sides.

    Args:
        written: r1 of each channel.
        read: r2 of each channel.
        alpha: 0 makes all written ranges alike, 1 all that are read.

    Returns:
        ``r2^alpha / r1^(1 - alpha)``, see `balanced`.
    """
    return balanced(read, written, alpha)


def smooth_factors(inputs: Tensor, read: Tensor, alpha: float) -> Tensor:
    """Factors of SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4), float64 [channels].

    Args:
        inputs: Largest absolute input of each channel.
        read: Largest absolute weight that reads it.
        alpha: Share of the inputs' range that moves into the weights.

    Returns:
        1 / s with ``s = inputs^alpha / read^(1 - alpha)``, see `balanced`.
    """
    return balanced(read, inputs, 1 - alpha)


def balanced(up: Tensor, down: Tensor, alpha: float) -> Tensor:
    """``up^alpha / down^(1 - alpha)`` with a geometric mean of 1; 1 where either is 0."""
    usable = (up > 0) & (down > 0)
    one = up.new_ones(())
    logs = alpha * up.where(usable, one).log() - (1 - alpha) * down.where(usable, one).log()
    mean = logs[usable].mean() if usable.any() else logs.new_zeros(())
    return (logs - mean).where(usable, logs.new_zeros(())).exp()


def searched_factors(model: Model, space: Space, found: InputStatistics, points: int) -> Tensor:
    """Factors of AWQ's search (Lin et al., arXiv 2306.00978, section 3.2), float64 [channels].

    ``s = mean|x|^a`` for a on a grid from 0 to 1; the real quantizer judges each by the error of
    the linears' outputs. No point of the grid is worse than a = 0, which changes nothing.

    Args:
        model: The model; its judge quantizes a matrix and gives the error.
        space: The channels.
        found: Statistics with the Hessian.
        points: Points of the grid beyond 0.
    """
    means = channel_score(found, space, "mean")
    best, least = torch.ones_like(means), torch.inf
    for factors in _grid(means, points):
        loss = _loss(model, space, found, factors)
        if loss < least:
            best, least = factors, loss
    return best


def _grid(means: Tensor, points: int) -> Iterator[Tensor]:
    yield torch.ones_like(means)
    for point in range(1, points + 1):
        yield balanced(torch.ones_like(means), means, 1 - point / points)


def _loss(model: Model, space: Space, found: InputStatistics, factors: Tensor) -> float:
    """Squared error of all linears that read the channels, quantized in the new coordinates."""
    if found.hessian is None:
        raise ValueError(f"{space.name} was measured without its Hessian")
    spread = shared(space, factors)
    hessian = found.hessian * spread * spread[:, None]
    names = space.with_role(Role.READS, Role.READS_SHARED)
    return sum(model.judge(name, model.read(name) / spread, hessian) for name in names)
