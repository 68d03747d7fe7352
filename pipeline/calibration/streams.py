"""Two residual streams that walk the decoder blocks: the float model's and the quantized one's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pipeline.calibration.moments import Moments

KEPT_BYTES = 2**31
"""Most memory that a stream takes to compute the inputs of the site down once and not twice."""


class HasSites(Protocol):
    """What can say what the linears of a site get."""

    def site_input(self, site: str, residual: Tensor, heads: Tensor | None = None) -> Tensor:
        """Input of the site's linears."""


class Block(HasSites, Protocol):
    """What a decoder block must offer, see `runtimes.torch_reference.DecoderBlock`."""

    def heads(self, residual: Tensor) -> Tensor:
        """Concatenated heads' outputs."""

    def add_attention(self, residual: Tensor, heads: Tensor) -> Tensor:
        """Residual stream after attention."""

    def add_mlp(self, residual: Tensor, inner: Tensor | None = None) -> Tensor:
        """Residual stream after the MLP."""


@dataclass
class Stream:
    """Residual stream of all calibration windows at one point of a block.

    Attributes:
        residual: One tensor [windows, length, hidden] per batch.
        heads: Heads' outputs per batch, between the sites qkv and o; empty elsewhere.
        inner: Inputs of the site down per batch, between gate_up and down if all of them take at
            most `KEPT_BYTES`; empty elsewhere, and they are computed each time they are needed.
    """

    residual: list[Tensor]
    heads: list[Tensor] = field(default_factory=list)
    inner: list[Tensor] = field(default_factory=list)

    def site_input(self, block: HasSites, site: str, batch: int) -> Tensor:
        """Input of a site's linears for one batch."""
        if site == "down" and self.inner:
            return self.inner[batch]
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
        elif site == "gate_up":
            self._keep_inner(block)
        elif site == "down":
            for i, residual in enumerate(self.residual):
                inner = self.inner[i] if self.inner else None
                self.residual[i] = block.add_mlp(residual, inner)
            self.inner = []

    def _keep_inner(self, block: Block) -> None:
        for residual in self.residual:
            inner = block.site_input("down", residual)
            if len(self.residual) * inner.nbytes > KEPT_BYTES:
                return
            self.inner.append(inner)

    def pass_block(self, block: Callable[[Tensor], Tensor]) -> None:
        """Move past a whole block whose linears are final."""
        for i, residual in enumerate(self.residual):
            self.residual[i] = block(residual)


JOINING = ("o", "down")
"""Sites whose outputs are added to the residual stream."""


@dataclass(frozen=True)
class SiteMoments:
    """Second moments of one site's inputs.

    Attributes:
        solving: Of the batches that the solver sees.
        halves: The same as two sums, of the first and the second half of the text, if asked for.
        held_out: Of the batches that were kept apart; None if there are none.
    """

    solving: Moments
    halves: tuple[Moments, Moments] | None = None
    held_out: Moments | None = None

    def centred(self) -> SiteMoments:
        """All of them about their means."""
        halves = (
            None if self.halves is None else (self.halves[0].centred(), self.halves[1].centred())
        )
        apart = None if self.held_out is None else self.held_out.centred()
        return SiteMoments(self.solving.centred(), halves, apart)


@dataclass(frozen=True)
class MomentOptions:
    """What to accumulate besides H, G and C.

    Attributes:
        held_out: Share of the batches that is kept apart, spread evenly over the text; at least
            one batch, and none if there is only one.
        halves: Whether to sum the two halves of the text apart (needs two batches).
        mismatch: Whether to accumulate the moment of the inputs' difference.
        coefficients: Share of each sample's mismatch that enters G, [samples], or None.
    """

    held_out: float = 0.0
    halves: bool = False
    mismatch: bool = False
    coefficients: Tensor | None = None


@torch.inference_mode()
def site_moments(
    site: str,
    quantized: tuple[HasSites, Stream],
    reference: tuple[HasSites, Stream] | None,
    name: str,
    options: MomentOptions | None = None,
    weights: Tensor | None = None,
) -> SiteMoments:
    """Second moments of one site's inputs over all calibration tokens.

    Args:
        site: Name of the site.
        quantized: The partly quantized block and its stream.
        reference: The float block and its stream; None for symmetric calibration.
        name: Name of block and site, for messages.
        options: What else to accumulate.
        weights: How much each token counts, [samples, length]; None is 1.
    """
    options = options or MomentOptions()
    block, stream = quantized
    parts = _parts(len(stream.residual), options)
    sums: dict[str, Moments] = {}
    sample = 0
    for batch, residual in enumerate(stream.residual):
        inputs = stream.site_input(block, site, batch)
        other = lost = coefficients = None
        if reference is not None:
            other = reference[1].site_input(reference[0], site, batch)
            if site in JOINING:
                lost = reference[1].residual[batch] - residual
            if options.coefficients is not None:
                coefficients = options.coefficients[sample : sample + len(inputs)]
        if parts[batch] not in sums:
            sums[parts[batch]] = Moments(
                inputs.shape[-1],
                cross=other is not None,
                mismatch=options.mismatch and other is not None,
                hidden=0 if lost is None else lost.shape[-1],
                name=name,
                device=inputs.device,
            )
        part = None if weights is None else weights[sample : sample + len(inputs)]
        sums[parts[batch]].add(inputs, other, sample, coefficients, lost, part)
        sample += len(inputs)
    apart = sums.pop("held out", None)
    if not sums:
        raise ValueError("no calibration windows")
    solving, *rest = sums.values()
    if not rest:
        return SiteMoments(solving, None, apart)
    return SiteMoments(solving + rest[0], (solving, rest[0]), apart)


def _parts(batches: int, options: MomentOptions) -> list[str]:
    """The sum that each batch goes to."""
    parts = ["first" if n < batches / 2 or not options.halves else "second" for n in range(batches)]
    for n in held_out_batches(batches, options.held_out):
        parts[n] = "held out"
    return parts


def held_out_batches(batches: int, share: float) -> list[int]:
    """Batches of windows that solvers do not see, spread evenly; not all of them."""
    if share == 0 or batches < 2:
        return []
    count = min(max(1, round(share * batches)), batches - 1)
    return [(2 * n + 1) * batches // (2 * count) for n in range(count)]
