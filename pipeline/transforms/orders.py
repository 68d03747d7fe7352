"""Orders of channels from one score a channel.

Block rotations and block scales want opposite things. A rotation of a block spreads an outlier over
its block only, so that the largest value after it is at most the block's l1 mass over ``sqrt(b)``:
blocks should have equal masses (MixQuant, arXiv 2601.22347, propositions 3.3 and 3.5). A scale for
a block of weights wants weights of one size in it: blocks should be as unequal as possible.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor


def mass_diffusion(scores: Tensor, block: int) -> Tensor:
    """Blocks of nearly equal mass (MixQuant, algorithm 1), int64 [channels].

    The largest channels seed the blocks; every further one, in falling order, goes to the block
    that has the least mass and is not full. The published step takes the mean over tokens of a sum
    of absolute values, which is the sum of the means, so that scores suffice: longest processing
    time first, O(d log d).

    Args:
        scores: Mean absolute value of each channel, not negative.
        block: Channels a block; divides their number.
    """
    falling = scores.argsort(dim=0, descending=True, stable=True).tolist()
    blocks: list[list[int]] = [[] for _ in range(len(scores) // block)]
    open_blocks = [(0.0, n) for n in range(len(blocks))]
    for channel in falling:
        mass, n = heapq.heappop(open_blocks)
        blocks[n].append(channel)
        if len(blocks[n]) < block:
            heapq.heappush(open_blocks, (mass + float(scores[channel]), n))
    return torch.tensor(blocks).flatten()


def zigzag(scores: Tensor, block: int) -> Tensor:
    """Channels dealt out to the blocks in falling order, forth and back, int64 [channels]."""
    falling = scores.argsort(dim=0, descending=True, stable=True)
    rounds = falling.reshape(block, len(scores) // block).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()


def falling(scores: Tensor) -> Tensor:
    """Channels from the largest score to the smallest, int64 [channels]."""
    return scores.argsort(dim=0, descending=True, stable=True)


def alike_blocks(sizes: Tensor, mass: Tensor, block: int) -> Tensor:
    """Channels of similar size in one block, blocks from the largest mass to the smallest.

    Rounding columns in falling order of their Hessian diagonal (GPTQ's activation order) needs no
    reordering then where formats round block by block.

    Args:
        sizes: Size of each channel's weights.
        mass: Mean square of each channel's input.
        block: Channels a block; divides their number.
    """
    by_block = falling(sizes).reshape(-1, block)
    return by_block[falling(mass[by_block].sum(1))].flatten()


def block_mass(scores: Tensor, block: int) -> Tensor:
    """Mean l1 mass of each block, from the mean absolute values of its channels, [blocks]."""
    return scores.reshape(-1, block).sum(1)
