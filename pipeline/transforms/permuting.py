"""Orders of channels, merged into the weights, so that they cost nothing at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.architectures.spaces import Role, Space
from pipeline.transforms.model import Model, columns_of
from pipeline.transforms.operators import Permutation


def plan_permutation(model: Model, options: Mapping[str, Any]) -> None:
    """Reorder the channels of every space that is asked for."""
    generator = torch.Generator().manual_seed(options["seed"])
    for space in list(model.of_kinds(str(options["spaces"]).split("+"))):
        if options["by"] == "random":
            scores = torch.rand(space.width, dtype=torch.float64, generator=generator)
        else:
            scores = (
                _head_sizes(model, space)
                if space.kind == "heads"
                else (columns_of(model, space, "square"))
            )
        model.change(space, Permutation(sorted_within(space, scores)))


def _head_sizes(model: Model, space: Space) -> Tensor:
    """Mean square weight of each query head's columns in o_proj, float64 [heads]."""
    weight = model.read(space.with_role(Role.READS_HEADS)[0])
    return weight.reshape(len(weight), space.width, -1).square().mean((0, 2))


def sorted_within(space: Space, scores: Tensor) -> Tensor:
    """Channels from the largest score to the smallest, each in its unit, int64 [width].

    Units of heads are sorted too: by the largest score in them.
    """
    by_unit = scores.reshape(-1, space.unit)
    order = by_unit.argsort(dim=1, descending=True, stable=True)
    order = order + torch.arange(len(by_unit))[:, None] * space.unit
    if space.kind == "heads":
        order = order[by_unit.amax(1).argsort(dim=0, descending=True, stable=True)]
    return order.flatten()
