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
    """

    scale: Tensor
    offset: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)
    level_indices: Tensor | None = None


ScaleRule = Callable[[Tensor, Tensor, Tensor, Format], BlockScales]
"""``rule(weights [rows, block], metric [block, block], linear [rows, block], format)``.

The rule minimises ``v' M v - 2 v' b`` over the scales of the block with metric M and linear term b.
"""
