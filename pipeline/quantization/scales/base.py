"""What a scale rule is: from the weights of one block to the fields that the format stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from pipeline.quantization.formats import Format


@dataclass(frozen=True)
class BlockScales:
    """Scales of one (super-)group of every row.

    Attributes:
        scale: Effective scale of each group, [rows, groups in the block].
        offset: Offset of each group, same shape; zeros without offsets.
        fields: The stored fields, each [rows, n], see `QuantizedTensor.scales`.
        level_indices: Codes found together with the scale, int64 [rows, block], if the rule finds
            them (as indices into the levels).
        revisable: Sub-scales may be chosen again as the sequential solver enters each group.
    """

    scale: Tensor
    offset: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)
    level_indices: Tensor | None = None
    revisable: bool = False


@dataclass(frozen=True)
class BlockProblem:
    """One (super-)group of every row: choose scales so that ``v' M v - 2 v' b`` becomes small.

    Attributes:
        weights: Values that are rounded, [rows, block].
        metric: M, symmetric positive definite, [block, block].
        linear: b, [rows, block]; None stands for ``weights @ metric``, where only rounding
            separates v from weights.
        inverse_root: Upper triangular U of the block inside the sequential solver, [block, block],
            under which columns are rounded one after the other; None under round to nearest.
    """

    weights: Tensor
    metric: Tensor
    linear: Tensor | None = None
    inverse_root: Tensor | None = None

    @property
    def b(self) -> Tensor:
        """The linear term, [rows, block]."""
        return self.weights @ self.metric if self.linear is None else self.linear


ScaleRule = Callable[[BlockProblem, Format], BlockScales]
"""From one block of all rows to its scales, and to its codes if the rule finds them."""
