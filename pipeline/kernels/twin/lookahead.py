"""The loss of sequential rounding in plain PyTorch, on any device.

The contract is in `pipeline.kernels.lookahead`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.twin.common import nearest_index


def sequential_loss(
    weights: Tensor, factor: Tensor, scales: Tensor, offsets: Tensor, levels: Tensor
) -> Tensor:
    """See `pipeline.kernels.sequential_loss`."""
    work = weights[:, None, :].repeat(1, scales.shape[1], 1)
    loss = torch.zeros_like(scales)
    divisor = torch.where(scales == 0, 1.0, scales)
    for i in range(weights.shape[1]):
        x = work[:, :, i]
        value = scales * levels[nearest_index((x - offsets) / divisor, levels)] + offsets
        error = (x - value) / factor[i, i]
        loss += error * error
        work[:, :, i + 1 :] -= error[:, :, None] * factor[i, i + 1 :]
    return loss
