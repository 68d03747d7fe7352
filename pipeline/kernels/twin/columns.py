"""Sequential rounding in plain PyTorch, on any device.

The contract is in `pipeline.kernels.columns`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.twin.common import nearest_index


def round_columns(
    weights: Tensor,
    factor: Tensor,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor,
    group_size: int,
    drift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pipeline.kernels.round_columns`."""
    work = weights.clone()
    indices = torch.empty(weights.shape, dtype=torch.int64, device=weights.device)
    errors = torch.empty_like(weights)
    zero = nearest_index(torch.zeros(1, dtype=levels.dtype, device=levels.device), levels)
    for i in range(weights.shape[1]):
        scale, offset = scales[:, i // group_size], offsets[:, i // group_size]
        index = nearest_index((work[:, i] - offset) / scale, levels)
        index = torch.where(scale == 0, zero, index)
        error = (work[:, i] - (scale * levels[index] + offset)) / factor[i, i]
        indices[:, i], errors[:, i] = index, error
        work[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
        if drift is not None:
            work[:, i + 1 :] += work[:, i, None] * drift[i, i + 1 :]
    return indices, errors
