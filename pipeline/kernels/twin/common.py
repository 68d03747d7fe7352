"""Nearest levels."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_index(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each value; a tie goes to the upper one."""
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.searchsorted(midpoints, values.contiguous(), right=True)
