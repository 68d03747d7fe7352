"""A change of basis of one space, merged into the tensors that see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.architectures.spaces import Role, Space
from pipeline.transforms.operators import Operator, Permutation, Rotation, restore

ReadTensor = Callable[[str], Tensor]
"""A tensor by its Hugging Face name."""


@dataclass(frozen=True)
class Change:
    """New coordinates of a space's channels.

    Attributes:
        space: The space.
        operator: The new coordinates.

    Raises:
        ValueError: The space does not allow it: another width, another kind of change, or channels
            that would leave the head that they belong to.
    """

    space: Space
    operator: Operator

    def __post_init__(self) -> None:
        space, operator = self.space, self.operator
        if operator.width != space.width:
            raise ValueError(f"{space.name} has {space.width} channels, not {operator.width}")
        if operator.does not in space.allows:
            raise ValueError(f"{space.name} allows no change of {operator.does}")
        if not (
            _keeps_groups(space, operator) if space.kind == "heads" else operator.keeps(space.unit)
        ):
            raise ValueError(f"{space.name}: channels would leave their head or group")

    def apply(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the model in the new coordinates; untouched if it does not see the space.

        Args:
            name: Hugging Face name.
            value: Matrix [out, in], bias or gain, float64.

        Raises:
            ValueError: A norm's gains are not one under a rotation.
        """
        role = self.space.roles.get(name)
        if role is None:
            return value
        operator = self.operator
        match role:
            case Role.WRITES:
                return operator.forward(value.mT).mT if value.ndim == 2 else operator.forward(value)
            case Role.EMBEDS:
                return operator.forward(value)
            case Role.READS:
                return operator.dual(value)
            case Role.READS_SHARED:
                return self._dual_shared(value)
            case Role.FOLLOWS:
                return _rows(value, operator.order) if isinstance(operator, Permutation) else value
            case Role.GAINS:
                return self._gains(name, value)
        return self._heads(role, value)

    def _dual_shared(self, value: Tensor) -> Tensor:
        """Columns of all query heads; those that share a key/value head change alike."""
        out, unit = len(value), self.space.unit
        by_share = value.reshape(out, -1, self.space.share, unit).transpose(1, 2)
        changed = self.operator.dual(by_share.reshape(out, self.space.share, -1))
        return changed.reshape(by_share.shape).transpose(1, 2).reshape(value.shape)

    def _gains(self, name: str, value: Tensor) -> Tensor:
        if isinstance(self.operator, Permutation):
            return self.operator.forward(value)
        if not (value == 1).all():
            raise ValueError(f"{name} must be folded before {self.space.name} is rotated")
        return value

    def _heads(self, role: Role, value: Tensor) -> Tensor:
        if not isinstance(self.operator, Permutation):
            raise ValueError(f"{self.space.name} is only ever permuted")
        order, width = self.operator.order, self.space.head_dim
        if role is Role.KEY_VALUE_HEADS:
            order = order[:: self.space.share] // self.space.share
        channels = (order[:, None] * width + torch.arange(width)).flatten()
        return value[:, channels] if role is Role.READS_HEADS else _rows(value, channels)


def _rows(value: Tensor, order: Tensor) -> Tensor:
    return value[order]


def _keeps_groups(space: Space, operator: Operator) -> bool:
    """Whether query heads that share a key/value head still do."""
    if not isinstance(operator, Permutation):
        return False
    groups = (operator.order // space.share).reshape(-1, space.share)
    return bool((groups == groups[:, :1]).all())


def changed(read: ReadTensor, changes: Sequence[Change]) -> ReadTensor:
    """Reads tensors in the new coordinates, one at a time; changes are made in order.

    Args:
        read: Gives the tensors in the old coordinates, float64.
        changes: What is done; only these are kept in memory.
    """

    def reading(name: str) -> Tensor:
        value = read(name)
        for change in changes:
            value = change.apply(name, value)
        return value

    return reading


def run_time_rotation(changes: Iterable[Change]) -> Rotation | None:
    """What the graph does to the inputs of every down_proj, if anything."""
    rotations = (change.operator for change in changes if change.space.kind == "online")
    return next((one for one in rotations if isinstance(one, Rotation)), None)


def flatten(changes: Iterable[Change]) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
    """Changes as named tensors, and for each its space and the class of its operator."""
    tensors: dict[str, Tensor] = {}
    described = []
    for index, change in enumerate(changes):
        kind = type(change.operator).__name__
        described.append({"space": change.space.name, "operator": kind})
        for name, value in change.operator.tensors().items():
            tensors[f"{index:05d}.{name}"] = value.contiguous().clone()
    return tensors, described


def unflatten(
    tensors: dict[str, Tensor], described: Sequence[dict[str, str]], spaces: Sequence[Space]
) -> list[Change]:
    """The inverse of `flatten`, given the model's spaces."""
    by_name = {space.name: space for space in spaces}
    found = []
    for index, entry in enumerate(described):
        prefix = f"{index:05d}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        found.append(Change(by_name[entry["space"]], restore(entry["operator"], own)))
    return found
