"""Orders of channels, merged into the weights, so that they cost nothing at run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.architectures.spaces import Role, Space
from pipeline.transforms.model import Model, columns_of
from pipeline.transforms.operators import Permutation
from pipeline.transforms.orders import (
    alike_blocks,
    block_mass,
    falling,
    mass_diffusion,
    zigzag,
)
from pipeline.transforms.statistics import SITES, channel_score

READING = ("qkv", "gate_up")
"""Sites that read the residual stream through a norm."""

DIFFUSING = ("massdiff", "zigzag")
"""Orders for block rotations."""

BLOCKWISE = (*DIFFUSING, "alike")
"""Orders that think in blocks."""

Scores = dict[str, Tensor]
"""``weights``: mean square weight; ``mean`` and ``square`` of inputs, where they are measured."""


def plan_permutation(model: Model, options: Mapping[str, Any]) -> None:
    """Reorder the channels of every space that is asked for.

    Raises:
        ValueError: The block does not divide a space's channels.
    """
    wanted = str(options["spaces"]).split("+")
    spaces = model.asked_for(wanted)
    for space in spaces:
        blockwise = options["by"] in BLOCKWISE and space.kind != "heads"
        if blockwise and space.unit % options["block"]:
            raise ValueError(f"blocks of {options['block']} do not divide {space.unit} channels")
    generator = torch.Generator().manual_seed(options["seed"])
    if options["by"] == "random":
        for space in spaces:
            scores = torch.rand(space.width, dtype=torch.float64, generator=generator)
            model.change(space, Permutation(_within(space, scores)))
    elif options["by"] == "magnitude":
        for space in spaces:
            model.change(space, Permutation(_within(space, _sizes(model, space))))
    else:
        _measured(model, spaces, options)


def _sizes(model: Model, space: Space) -> Tensor:
    """Mean square weight that reads each channel, or each query head, float64 [width]."""
    if space.kind != "heads":
        return columns_of(model, space, "square")
    weight = model.read(space.with_role(Role.READS_HEADS)[0])
    return weight.reshape(len(weight), space.width, -1).square().mean((0, 2))


def _within(space: Space, scores: Tensor) -> Tensor:
    """Channels from the largest score to the smallest, each in its unit, int64 [width].

    Units of heads are sorted too: by the largest score in them.
    """
    by_unit = scores.reshape(-1, space.unit)
    order = torch.stack([falling(one) for one in by_unit])
    order = order + torch.arange(len(by_unit))[:, None] * space.unit
    return (order[falling(by_unit.amax(1))] if space.kind == "heads" else order).flatten()


def _measured(model: Model, spaces: list[Space], options: Mapping[str, Any]) -> None:
    """Orders that depend on the inputs; one pass over the calibration text."""
    residual: Scores = {}
    for index, sites in model.measured():
        for space in spaces:
            if space.block == index and space.kind in SITES:
                found = sites[SITES[space.kind]]
                scores = {m: channel_score(found, space, m) for m in ("mean", "square")}
                _reorder(model, space, scores, options)
        for site in READING:
            if index is not None:
                found = sites[site]
                for measure, total in (("mean", found.absolute), ("square", found.square)):
                    mean = total / found.tokens
                    residual[measure] = residual.get(measure, torch.zeros_like(mean)) + mean
    for space in spaces:
        if space.kind == "residual":
            _reorder(model, space, residual, options)


def _reorder(model: Model, space: Space, scores: Scores, options: Mapping[str, Any]) -> None:
    block, by = options["block"], options["by"]
    if space.kind == "heads":
        model.change(space, Permutation(_within(space, scores["square"])))
        return
    sizes = _sizes(model, space) if by == "alike" else None
    order = torch.empty(space.width, dtype=torch.int64)
    for start in range(0, space.width, space.unit):
        unit = slice(start, start + space.unit)
        if by == "massdiff":
            chosen = mass_diffusion(scores["mean"][unit], block)
        elif by == "zigzag":
            chosen = zigzag(scores["mean"][unit], block)
        elif sizes is None:
            chosen = falling(scores["square"][unit])
        else:
            chosen = alike_blocks(sizes[unit], scores["square"][unit], block)
        order[unit] = chosen + start
    model.change(space, Permutation(order))
    if by in DIFFUSING:
        model.bounds.append(bounds_of(space, scores["mean"], order, block))


def bounds_of(space: Space, means: Tensor, order: Tensor, block: int) -> dict[str, Any]:
    """How far outliers can reach after a Hadamard rotation of each block, before and after.

    ``|H x|`` of a block is at most ``|x|_1 / sqrt(b)``, and is that where signs align; equal masses
    have the smallest such bound. Mean over the calibration tokens of the masses.

    Args:
        space: The space.
        means: Mean absolute value of each channel in the old order.
        order: The new order.
        block: Channels a block.
    """
    masses = {"before": block_mass(means, block), "after": block_mass(means[order], block)}
    root = block**0.5
    return {
        "space": space.name,
        "block": block,
        **{f"largest mass {when}": float(mass.max()) for when, mass in masses.items()},
        "even mass": float(masses["before"].mean()),
        **{f"bound {when}": float(mass.max()) / root for when, mass in masses.items()},
        "least bound": float(masses["before"].mean()) / root,
        "largest channel": float(means.max()),
    }
