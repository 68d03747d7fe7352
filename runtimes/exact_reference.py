"""The reference in float64, for claims that float32 could not tell from rounding.

Only the tables of the rotary embedding are float32, as transformers makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtimes.torch_reference import DecoderBlock, ReadTensor, TorchReference


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * gain`` in the precision of x.

    transformers' own norms compute in float32 whatever they are given.

    Args:
        width: Channels.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float64), requires_grad=False)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The normed channels of the last dimension."""
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps)
        return x * scale * self.weight


class ExactReference(TorchReference):
    """Transformers' modules in float64, their norms replaced by `RMSNorm`.

    Args:
        config: The transformers configuration.
        read: Returns the weights; they are converted to float64.
        **options: Those of `TorchReference`.
    """

    name = "torch float64"

    def __init__(self, config: Any, read: ReadTensor, **options: Any) -> None:
        super().__init__(config, lambda name: read(name).double(), **options)
        self._stock_norm, self._norm_class = self._norm_class, RMSNorm

    def block(self, index: int) -> DecoderBlock:
        """Block `index` with its weights read."""
        block = super().block(index)
        for module in list(block.layer.modules()):
            for name, child in module.named_children():
                if isinstance(child, self._stock_norm):
                    norm = RMSNorm(len(child.weight), self.config.rms_norm_eps)
                    norm.weight = child.weight
                    setattr(module, name, norm)
        return block
