"""The order in which the sequential solver visits columns, groups kept whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.quantization.formats import Format


@dataclass(frozen=True)
class ColumnOrder:
    """A permutation of the columns that keeps every group and super-group contiguous.

    Attributes:
        columns: int64 [in], column at each position.
        groups: int64 [groups], group at each position.
        super_groups: int64 [super-groups], super-group at each position.
    """

    columns: Tensor
    groups: Tensor
    super_groups: Tensor

    @classmethod
    def natural(cls, width: int, fmt: Format) -> ColumnOrder:
        """Columns as they are stored."""
        return cls(
            torch.arange(width),
            torch.arange(width // fmt.group_of(width)),
            torch.arange(width // fmt.block_of(width)),
        )

    @classmethod
    def by_activation(cls, diagonal: Tensor, fmt: Format) -> ColumnOrder:
        """Descending mass of ``diag(H)``: super-groups, groups inside them, columns inside those.

        Formats with a codebook keep their vectors whole, too: these are ordered by their mass.

        Args:
            diagonal: ``diag(H)``, [in].
            fmt: Format whose groups stay whole (formats without activation indices).
        """
        width = len(diagonal)
        group, block = fmt.group_of(width), fmt.block_of(width)
        mass = diagonal.double().cpu()
        group_mass = mass.reshape(-1, group).sum(1)
        block_order = _descending(mass.reshape(-1, block).sum(1))
        per_block = group_mass.reshape(-1, block // group)
        group_order = torch.cat(
            [b * (block // group) + _descending(per_block[b]) for b in block_order]
        )
        per_group = mass.reshape(-1, group)
        column_order = torch.cat([g * group + _inside(per_group[g], fmt) for g in group_order])
        return cls(column_order, group_order, block_order)

    @classmethod
    def shuffled(cls, diagonal: Tensor, fmt: Format, generator: torch.Generator) -> ColumnOrder:
        """Super-groups, and groups inside them, in random order; columns inside by activation.

        Args:
            diagonal: ``diag(H)``, [in].
            fmt: Format whose groups stay whole.
            generator: Source of the order, on the CPU.
        """
        width = len(diagonal)
        group, block = fmt.group_of(width), fmt.block_of(width)
        mass = diagonal.double().cpu().reshape(-1, group)
        per_block = block // group
        block_order = torch.randperm(width // block, generator=generator)
        group_order = torch.cat(
            [b * per_block + torch.randperm(per_block, generator=generator) for b in block_order]
        )
        columns = torch.cat([g * group + _inside(mass[g], fmt) for g in group_order])
        return cls(columns, group_order, block_order)


def _inside(mass: Tensor, fmt: Format) -> Tensor:
    """Places of one group's columns by descending mass, vectors kept whole, int64 [group]."""
    if fmt.vector == 1:
        return _descending(mass)
    vectors = _descending(mass.reshape(-1, fmt.vector).sum(1))
    return (vectors[:, None] * fmt.vector + torch.arange(fmt.vector)).reshape(-1)


def _descending(values: Tensor) -> Tensor:
    return torch.argsort(values, descending=True, stable=True)
