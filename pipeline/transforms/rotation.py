"""Rotations that are merged into the weights: R1 of the residual stream, R2 of the values.

QuaRot (arXiv 2404.00456) rotates by randomized Hadamard matrices, SpinQuant (2405.16406) by learned
ones. The rotations at run time that both add for quantized activations and caches are not weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.architectures.spaces import Space
from pipeline.transforms.folding import plan_fold
from pipeline.transforms.hadamard import hadamard_factors
from pipeline.transforms.model import Model
from pipeline.transforms.operators import Operator, hadamard_rotation, orthogonal_rotation


def plan_rotation(model: Model, options: Mapping[str, Any]) -> None:
    """Rotate the residual stream, folding norms first, and each key/value head's values.

    Every space has matrices of its own, drawn one after the other from the seed.

    Raises:
        ValueError: The block does not divide the residual stream.
    """
    wanted = str(options["spaces"]).split("+")
    generator = torch.Generator().manual_seed(options["seed"])
    if "residual" in wanted:
        plan_fold(model, {})
    for space in list(model.of_kinds(wanted)):
        model.change(space, _rotation(model, space, options, generator))


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
