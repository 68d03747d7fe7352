"""Scales that were chosen before the solver starts."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.quantization.formats import SUPER_FIELDS, Format, QuantizedTensor
from pipeline.quantization.scales.base import BlockProblem, BlockScales, ScaleRule


def fixed_scales(quantized: QuantizedTensor, blocks: Tensor) -> ScaleRule:
    """A rule that hands out the scales of another solution, block by block.

    With scales of the same layer's round to nearest it makes the layer-wise interleaved variants of
    PiSO (arXiv 2606.10890), with scales of a pass over the whole model the decoupled ones.

    Args:
        quantized: The solution whose scales are kept; its codes are not used.
        blocks: (Super-)groups in the order in which the solver will ask, int64 [blocks].
    """
    scales = quantized.group_scales().double()
    offsets = quantized.group_offsets()
    offsets = torch.zeros_like(scales) if offsets is None else offsets.double()
    coming = iter(blocks.tolist())

    def rule(problem: BlockProblem, asked: Format) -> BlockScales:
        g = next(coming)
        per_block = problem.weights.shape[1] // asked.group_of(problem.weights.shape[1])
        groups = slice(g * per_block, (g + 1) * per_block)
        fields = {
            name: value[:, g : g + 1] if name in SUPER_FIELDS else value[:, groups]
            for name, value in quantized.scales.items()
        }
        return BlockScales(scales[:, groups], offsets[:, groups], fields)

    return rule
