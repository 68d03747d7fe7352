"""What the planner of a transform sees: the model as it is after the transforms before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.architectures.spaces import Role, Space
from pipeline.transforms.changes import Change, ReadTensor, changed, run_time_rotation
from pipeline.transforms.network import NetworkLoss
from pipeline.transforms.operators import Operator
from pipeline.transforms.statistics import InputStatistics

Measured = Iterator[tuple[int | None, dict[str, InputStatistics]]]
"""Block by block the statistics of each site's inputs; last, under None, those of the head."""


Inner = Callable[[Tensor], Tensor] | None
"""What the graph does to the inputs of down_proj at run time."""

Measure = Callable[[ReadTensor, Inner, bool], Measured]
"""Runs a model of these weights; whether Hessians are wanted."""

Build = Callable[[ReadTensor, Inner, Sequence[Space]], NetworkLoss]
"""The loss of the quantized network of these weights whose spaces are to be rotated."""


def _cannot_build(read: ReadTensor, inner: Inner, spaces: Sequence[Space]) -> NetworkLoss:
    raise ValueError("no calibration inputs are at hand")


def _untold(number: int, count: int, figures: dict[str, float]) -> None:
    pass


def _cannot_measure(read: ReadTensor, inner: Inner, hessian: bool) -> Measured:
    raise ValueError("no calibration inputs are at hand")


def _cannot_quantize(name: str, weight: Tensor) -> Tensor:
    raise ValueError("no quantizer is at hand")


def _cannot_judge(name: str, weight: Tensor, hessian: Tensor) -> float:
    raise ValueError("no quantizer is at hand")


@dataclass
class Model:
    """A model whose weights are read one tensor at a time, and the changes made so far.

    Attributes:
        spaces: Where it may be changed.
        original: Reads its weights as they were, float64.
        changes: What was done; `read` has them applied.
        notes: What was left out of what was asked, in words.
        bounds: Bounds of block rotations, see `pipeline.transforms.permuting.bounds_of`.
        measure: Runs calibration text through the model that it is given, see `measured`.
        judge: Quantizes a matrix of that name as the recipe will, [out, in] under the Hessian of
            its inputs, and gives the squared error of its outputs.
        quantize: Quantizes a matrix of that name to nearest, without data, float64 [out, in].
        build: Makes the loss of the whole network, see `network`.
        tell: Told that a round of learning begins: its number from 1, how many there are, and
            figures of the one before.
    """

    spaces: tuple[Space, ...]
    original: ReadTensor
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bounds: list[dict[str, Any]] = field(default_factory=list)
    measure: Measure = _cannot_measure
    judge: Callable[[str, Tensor, Tensor], float] = _cannot_judge
    quantize: Callable[[str, Tensor], Tensor] = _cannot_quantize
    build: Build = _cannot_build
    tell: Callable[[int, int, dict[str, float]], None] = _untold

    def read(self, name: str) -> Tensor:
        """A tensor after the changes so far, float64."""
        return changed(self.original, self.changes)(name)

    def measured(self, *, hessian: bool = False) -> Measured:
        """Statistics of the inputs of every site, of the model as it is when each block is read.

        Args:
            hessian: Whether ``sum x x'`` is wanted too.
        """
        rotation = run_time_rotation(self.changes)
        return self.measure(self.read, rotation.apply if rotation else None, hessian)

    def network(self, spaces: Sequence[Space]) -> NetworkLoss:
        """The loss of the quantized network, from the model as it is, by rotations of spaces."""
        rotation = run_time_rotation(self.changes)
        return self.build(self.read, rotation.apply if rotation else None, spaces)

    def change(self, space: Space, operator: Operator) -> None:
        """Make one more change.

        Raises:
            ValueError: It would change what is rotated at run time.
        """
        rotated = {one.space.block for one in self.changes if one.space.kind == "online"}
        if space.block in rotated and space.kind in ("inner", "online"):
            raise ValueError("the inputs of down_proj are rotated at run time: put online last")
        self.changes.append(Change(space, operator))

    def of_kinds(self, kinds: Sequence[str]) -> Iterator[Space]:
        """The spaces of these kinds, in the model's order."""
        return (space for space in self.spaces if space.kind in kinds)

    def asked_for(self, kinds: Sequence[str]) -> list[Space]:
        """The same for kinds that a user named: one that the model lacks is noted."""
        for kind in kinds:
            if all(space.kind != kind for space in self.spaces):
                self.notes.append(f"{kind}: the model has no such space, nothing was done there")
        return list(self.of_kinds(kinds))


def columns_of(model: Model, space: Space, measure: str) -> Tensor:
    """Size of each channel in the matrices that read it, float64 [width].

    Args:
        model: The model.
        space: Any space but ``heads``.
        measure: ``max`` of absolute weights, or ``square``: the mean of their squares, over all
            matrices (and query heads that share the channel).
    """
    found = torch.zeros(space.width, dtype=torch.float64)
    count = 0
    for name in space.with_role(Role.READS, Role.READS_SHARED):
        weight = model.read(name)
        if space.roles[name] is Role.READS_SHARED:
            weight = by_channel(weight, space)
        if measure == "max":
            found = torch.maximum(found, weight.abs().amax(0))
        else:
            found += weight.square().sum(0)
            count += len(weight)
    return found if measure == "max" else found / count


def by_channel(weight: Tensor, space: Space) -> Tensor:
    """A matrix whose query heads share values, as one of [out * share, width]."""
    heads = weight.reshape(len(weight), -1, space.share, space.unit)
    return heads.transpose(1, 2).reshape(-1, space.width)


def rows_of(model: Model, space: Space) -> Tensor:
    """Largest absolute weight, or gain, that writes each channel, float64 [width]."""
    name = next(n for n in space.with_role(Role.WRITES) if n.endswith(".weight"))
    weight = model.read(name)
    return weight.abs().amax(1) if weight.ndim == 2 else weight.abs()
