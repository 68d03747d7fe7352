"""R4: the input of down_proj in a rotated basis, which the graph rotates at run time.

SwiGLU is no linear map, so that only the inverse can be merged, into down_proj. Random signs in
front of the Hadamard matrices are merged into up_proj: they are scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch

from pipeline.transforms.hadamard import hadamard_factors
from pipeline.transforms.model import Model
from pipeline.transforms.operators import Rotation, Scaling, hadamard_rotation

LARGEST = 64
"""Order up to which one factor of the run-time product is one matrix."""


def plan_online(model: Model, options: Mapping[str, Any]) -> None:
    """Rotate the inputs of every down_proj in blocks; the same matrix in all decoder blocks.

    Raises:
        ValueError: The block does not divide the width, or has no Hadamard matrix here.
    """
    block = options["block"]
    generator = torch.Generator().manual_seed(options["seed"])
    if hadamard_factors(block)[1] != 1:
        raise ValueError(f"no Hadamard matrix of order {block} can be constructed here")
    inner = {space.block: space for space in model.of_kinds(("inner",))}
    for space in list(model.of_kinds(("online",))):
        if space.width % block:
            raise ValueError(f"blocks of {block} do not divide {space.width} channels")
        signs = hadamard_rotation(space.width, block, generator).signs
        model.change(inner[space.block], Scaling(signs))
        model.change(space, hadamard_rotation(space.width, block, generator, signs=False))


def kronecker_pair(rotation: Rotation) -> tuple[np.ndarray, np.ndarray]:
    """Matrices A and B, float32, whose Kronecker product rotates each block.

    A block's channels, row by row a matrix X, become ``A X B'``.

    Args:
        rotation: Without signs.

    Raises:
        ValueError: It has signs, which are merged elsewhere.
    """
    if not (rotation.signs == 1).all():
        raise ValueError("the signs of a rotation at run time belong into up_proj")
    factors = [factor.numpy() for factor in rotation.factors]
    split = len(factors)
    while split and prod(len(f) for f in factors[split - 1 :]) <= LARGEST:
        split -= 1
    pair = []
    for some in (factors[:split], factors[split:]):
        matrix = np.ones((1, 1))
        for factor in some:
            matrix = np.kron(matrix, factor)
        pair.append(matrix.astype(np.float32))
    return pair[0], pair[1]
