"""Two residual streams that walk the decoder blocks: the float model's and the quantized one's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pipeline.calibration.moments import Moments


class Block(Protocol):
    """What a decoder block must offer, see `runtimes.torch_reference.DecoderBlock`."""

    def site_input(self, site: str, residual: Tensor, heads: Tensor | None = None) -> Tensor:
        """Input of the site's linears."""

    def heads(self, residual: Tensor) -> Tensor:
        """Concatenated heads' outputs."""

    def add_attention(self, residual: Tensor, heads: Tensor) -> Tensor:
        """Residual stream after attention."""

    def add_mlp(self, residual: Tensor) -> Tensor:
        """Residual stream after the MLP."""


@dataclass
class Stream:
    """Residual stream of all calibration windows at one point of a block.

    Attributes:
        residual: One tensor [windows, length, hidden] per batch.
        heads: Heads' outputs per batch, between the sites qkv and o; empty elsewhere.
    """

    residual: list[Tensor]
    heads: list[Tensor] = field(default_factory=list)

    def site_input(self, block: Block, site: str, batch: int) -> Tensor:
        """Input of a site's linears for one batch."""
        heads = self.heads[batch] if self.heads else None
        return block.site_input(site, self.residual[batch], heads)

    def pass_site(self, block: Block, site: str) -> None:
        """Move past a site, whose linears are now final."""
        if site == "qkv":
            self.heads = [block.heads(r) for r in self.residual]
        elif site == "o":
            for i, heads in enumerate(self.heads):
                self.residual[i] = block.add_attention(self.residual[i], heads)
            self.heads = []
        elif site == "down":
            for i, residual in enumerate(self.residual):
                self.residual[i] = block.add_mlp(residual)

    def pass_block(self, block: Callable[[Tensor], Tensor]) -> None:
        """Move past a whole block whose linears are final."""
        for i, residual in enumerate(self.residual):
            self.residual[i] = block(residual)


@torch.inference_mode()
def site_moments(
    site: str,
    quantized: tuple[Block, Stream],
    reference: tuple[Block, Stream] | None,
    name: str,
) -> Moments:
    """Second moments of one site's inputs over all calibration tokens.

    Args:
        site: Name of the site.
        quantized: The partly quantized block and its stream.
        reference: The float block and its stream; None for symmetric calibration.
        name: Name of block and site, for messages.
    """
    block, stream = quantized
    moments: Moments | None = None
    sample = 0
    for batch in range(len(stream.residual)):
        inputs = stream.site_input(block, site, batch)
        other = None if reference is None else reference[1].site_input(reference[0], site, batch)
        if moments is None:
            moments = Moments(inputs.shape[-1], cross=reference is not None, name=name)
        moments.add(inputs, other, sample)
        sample += len(inputs)
    if moments is None:
        raise ValueError("no calibration windows")
    return moments
