"""Sequential rounding in Triton. The contract is in `pipeline.kernels.columns`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.gpu.common import (
    block_of,
    divide,
    load_midpoints,
    nearest,
    on_device_of,
    pick,
)


@triton.jit
def _round_row(  # type: ignore[no-untyped-def]
    weights,
    factor,
    scales,
    offsets,
    levels,
    drift,
    indices,
    errors,
    count,
    DRIFT: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scales += row * (WIDTH // GROUP)
    offsets += row * (WIDTH // GROUP)
    work = tl.load(weights + row * WIDTH + columns, mask=inside, other=0.0)
    midpoints = load_midpoints(levels, count, LEVELS)
    zero = nearest(0.0, midpoints)
    found = tl.zeros((BLOCK,), tl.int32)
    spread = tl.zeros_like(work)
    for i in range(WIDTH):
        scale = tl.load(scales + i // GROUP)
        offset = tl.load(offsets + i // GROUP)
        line = factor + i * WIDTH
        value = pick(work, columns == i)
        scaled = divide(value - offset, tl.where(scale == 0, 1.0, scale))
        index = tl.where(scale == 0, zero, nearest(scaled, midpoints))
        rounded = scale * tl.load(levels + index) + offset
        error = divide(value - rounded, tl.load(line + i))
        later = inside & (columns > i)
        work -= error * tl.load(line + columns, mask=later, other=0.0)
        if DRIFT:
            work += value * tl.load(drift + i * WIDTH + columns, mask=later, other=0.0)
        found = tl.where(columns == i, index, found)
        spread = tl.where(columns == i, error, spread)
    tl.store(indices + row * WIDTH + columns, found.to(tl.int64), mask=inside)
    tl.store(errors + row * WIDTH + columns, spread, mask=inside)


def round_columns(
    weights: Tensor,
    factor: Tensor,
    scales: Tensor,
    offsets: Tensor,
    levels: Tensor,
    group_size: int,
    drift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `pipeline.kernels.round_columns`; all tensors contiguous and of one dtype."""
    rows, width = weights.shape
    indices = torch.empty((rows, width), dtype=torch.int64, device=weights.device)
    errors = torch.empty_like(weights)
    if rows:
        with on_device_of(weights):
            _round_row[(rows,)](
                *(weights, factor, scales, offsets, levels, factor if drift is None else drift),
                *(indices, errors, len(levels), drift is not None),
                *(block_of(len(levels)), block_of(width), width, group_size),
                num_warps=1,
                enable_fp_fusion=False,
            )
    return indices, errors
