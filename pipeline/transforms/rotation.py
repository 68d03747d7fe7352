"""Rotations that are merged into the weights: R1 of the residual stream, R2 of the values.

QuaRot (arXiv 2404.00456) rotates by randomized Hadamard matrices, SpinQuant (2405.16406) by learned
ones. The rotations at run time that both add for quantized activations and caches are not weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.architectures.spaces import Role, Space
from pipeline.transforms import TRANSFORMS
from pipeline.transforms.folding import plan_fold
from pipeline.transforms.hadamard import hadamard_factors
from pipeline.transforms.model import Model
from pipeline.transforms.network import Descent, learn
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
        ValueError: The block does not divide the residual stream, or is to be learned, there is
            nothing to learn, or an option belongs to what was not asked for.
    """
    wanted = str(options["spaces"]).split("+")
    check_learning(options, wanted)
    by_layers = options["matrix"] == "learned" and options["objective"] == "layers"
    by_network = options["matrix"] == "learned" and not by_layers
    if by_layers and "values" in wanted:
        model.notes.append(
            "values: rotated by Hadamard matrices, which objective=network learns too"
        )
    generator = torch.Generator().manual_seed(options["seed"])
    if "residual" in wanted:
        plan_fold(model, {})
    starts = []
    for space in model.asked_for(wanted):
        rotation = _rotation(model, space, options, generator)
        if by_layers and space.kind == "residual":
            rotation = _learned(model, space, rotation, options)
        if by_network:
            starts.append((space, rotation))
        else:
            model.change(space, rotation)
    if starts:
        _learn_from_network(model, starts, options)


LEARNING = {"layers": ("blocks",), "network": ("batch", "momentum")}
"""Options that only one objective of learning has."""


def check_learning(options: Mapping[str, Any], wanted: Sequence[str]) -> None:
    """Raises ValueError where an option would be ignored, or what is asked cannot be learned."""
    defaults = {name: option.default for name, option in TRANSFORMS["rotate"].options.items()}
    learned, objective = options["matrix"] == "learned", options["objective"]
    for owner, names in LEARNING.items():
        for name in names:
            if options[name] != defaults[name] and not (learned and objective == owner):
                raise ValueError(f"{name} needs matrix=learned and objective={owner}")
    for name in ("objective", "steps", "rate"):
        if options[name] != defaults[name] and not learned:
            raise ValueError(f"{name}={options[name]} needs matrix=learned")
    if learned and options["block"]:
        raise ValueError("a learned rotation is one of the whole residual stream")
    if learned and objective == "layers" and "residual" not in wanted:
        raise ValueError("a rotation learned from layers is one of the residual stream")


def _learn_from_network(
    model: Model, starts: Sequence[tuple[Space, Operator]], options: Mapping[str, Any]
) -> None:
    """Learn all rotations together from the loss of the network, see `pipeline.transforms.network`.

    One step length serves R1, another all R2.
    """
    spaces = [space for space, _ in starts]
    network = model.network(spaces)
    how = Descent(**{f.name: options[f.name] for f in fields(Descent)})

    def tell(number: int, count: int, held_out: float, loss: float) -> None:
        figures = {"held-out KLD": held_out} | ({} if loss != loss else {"KLD": loss})
        model.tell(number, count, figures)

    groups = [0 if space.kind == "residual" else 1 for space in spaces]
    matrices = [_stack(space, operator).to(network.device) for space, operator in starts]
    found = learn(matrices, groups, network, how, tell)
    for space, learned in zip(spaces, found.matrices, strict=True):
        model.change(space, BlockRotation(learned.cpu().contiguous()))
    names = " and ".join(dict.fromkeys(space.kind for space in spaces))
    model.notes.append(
        f"rotations of {names} learned from the network: KL divergence of {found.held_out} "
        f"held-out windows {found.first:.4g} with the Hadamard ones, {found.least:.4g} with the "
        f"best, after {found.step} of {how.steps} steps"
    )


def _stack(space: Space, operator: Operator) -> Tensor:
    """The matrices of a rotation, one for each unit of the space, float64 [units, unit, unit]."""
    matrix = operator.forward(torch.eye(space.width, dtype=torch.float64)).T
    units = range(0, space.width, space.unit)
    return torch.stack([matrix[n : n + space.unit, n : n + space.unit] for n in units])


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
