"""Rotations that are merged into the weights: R1 of the residual stream, R2 of the values.

QuaRot (arXiv 2404.00456) rotates by randomized Hadamard matrices, SpinQuant (2405.16406) by learned
ones. The rotations at run time that both add for quantized activations and caches are not weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from pipeline.architectures.spaces import Role, Space
from pipeline.transforms.folding import plan_fold
from pipeline.transforms.hadamard import hadamard_factors
from pipeline.transforms.model import Model
from pipeline.transforms.operators import (
    BlockRotation,
    Operator,
    hadamard_rotation,
    orthogonal_rotation,
)
from pipeline.transforms.statistics import InputStatistics
from pipeline.transforms.stiefel import Linear, learn_rotation


def plan_rotation(model: Model, options: Mapping[str, Any]) -> None:
    """Rotate the residual stream, folding norms first, and each key/value head's values.

    Every space has matrices of its own, drawn one after the other from the seed.

    Raises:
        ValueError: The block does not divide the residual stream, or is to be learned, or there is
            nothing to learn.
    """
    wanted = str(options["spaces"]).split("+")
    if options["matrix"] == "learned":
        if "residual" not in wanted or options["block"]:
            raise ValueError("a learned rotation is one of the whole residual stream")
        if "values" in wanted:
            model.notes.append("values: rotated by Hadamard matrices, which are not learned")
    generator = torch.Generator().manual_seed(options["seed"])
    if "residual" in wanted:
        plan_fold(model, {})
    for space in model.asked_for(wanted):
        rotation = _rotation(model, space, options, generator)
        if options["matrix"] == "learned" and space.kind == "residual":
            rotation = _learned(model, space, rotation, options)
        model.change(space, rotation)


def _learned(
    model: Model, space: Space, start: Operator, options: Mapping[str, Any]
) -> BlockRotation:
    """The residual stream's rotation, learned from `start` on some decoder blocks.

    Their matrices and second moments are in memory, 16 bytes a weight and more for down_proj's
    inputs squared: `blocks` bounds it, not the size of the model.
    """
    layers = len({one.block for one in model.spaces if one.block is not None})
    count = min(options["blocks"], layers)
    chosen = {(2 * n + 1) * layers // (2 * count) for n in range(count)}
    groups = []
    for index, sites in model.measured(hessian=True):
        if index is not None and index in chosen:
            groups.append(_linears(model, space, index, sites))
    matrix = start.forward(torch.eye(space.width, dtype=torch.float64)).T.contiguous()
    learned, first, least = learn_rotation(
        matrix, groups, steps=options["steps"], rate=options["rate"]
    )
    model.notes.append(
        f"learned rotation: error {first:.4g} of the Hadamard one, {least:.4g} of the best "
        f"in {options['steps']} steps on blocks {', '.join(map(str, sorted(chosen)))}"
    )
    return BlockRotation(learned[None].contiguous())


def _linears(
    model: Model, space: Space, index: int, sites: Mapping[str, InputStatistics]
) -> list[Linear]:
    """The matrices of one block that see the residual stream."""
    found = []
    for name in space.with_role(Role.READS, Role.WRITES):
        if f".{index}." not in name or not name.endswith(".weight"):
            continue
        leaf = name.split(".")[-2]
        hessian = sites[SITE_OF[leaf]].hessian
        if hessian is None:
            raise ValueError(f"{name} was measured without its Hessian")
        reads = space.roles[name] is Role.READS
        found.append(Linear(model.read(name), hessian, reads, partial(model.quantize, name)))
    return found


SITE_OF = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
    "o_proj": "o",
    "down_proj": "down",
}
"""Site of each linear."""


def _rotation(
    model: Model, space: Space, options: Mapping[str, Any], generator: torch.Generator
) -> Operator:
    block = space.unit
    if space.kind == "residual" and options["block"]:
        block = int(options["block"])
        if space.width % block:
            raise ValueError(f"blocks of {block} do not divide {space.width} channels")
    if options["matrix"] == "orthogonal":
        return orthogonal_rotation(space.width, block, generator)
    rest = hadamard_factors(block)[1]
    if rest > 1:
        note = f"{block} channels have no Hadamard matrix here: a random factor of order {rest}"
        if note not in model.notes:
            model.notes.append(note)
    return hadamard_rotation(space.width, block, generator, signs=options["signs"])
