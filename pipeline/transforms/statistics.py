"""What calibration inputs tell a transform about channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.architectures.spaces import Space

SITES = {
    "attention_norm": "qkv",
    "values": "o",
    "heads": "o",
    "ffn_norm": "gate_up",
    "inner": "down",
    "final_norm": "head",
}
"""The site whose inputs are a space's channels."""


@dataclass
class InputStatistics:
    """Sums over calibration tokens of one site's inputs, float64.

    Attributes:
        absolute: Sum of ``|x|``, [in].
        largest: Largest ``|x|``, [in].
        square: Sum of ``x^2``, [in].
        hessian: Sum of ``x x'``, [in, in], or None if it was not asked for.
        tokens: How many.
    """

    absolute: Tensor
    largest: Tensor
    square: Tensor
    hessian: Tensor | None
    tokens: int = 0

    @classmethod
    def empty(
        cls, width: int, *, hessian: bool, device: torch.device | str = "cpu"
    ) -> InputStatistics:
        """Of no tokens."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        moments = zeros(width, width) if hessian else None
        return cls(zeros(width), zeros(width), zeros(width), moments)

    def add(self, inputs: Tensor) -> None:
        """Add tokens, [..., in]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        self.absolute += flat.abs().sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, flat.abs().amax(0).double())
        self.square += flat.square().sum(0, dtype=torch.float64)
        if self.hessian is not None:
            self.hessian += flat.T @ flat
        self.tokens += len(flat)

    def cpu(self) -> InputStatistics:
        """The same in main memory."""
        hessian = None if self.hessian is None else self.hessian.cpu()
        parts = (self.absolute.cpu(), self.largest.cpu(), self.square.cpu())
        return InputStatistics(*parts, hessian, self.tokens)


def channel_score(found: InputStatistics, space: Space, measure: str) -> Tensor:
    """One number for each channel of a space, float64 [width].

    Args:
        found: Of the space's site.
        space: Channels that several query heads share are averaged (the largest for ``max``), query
            heads as a whole are summed.
        measure: ``mean`` of ``|x|``, ``max`` or mean ``square``.
    """
    values = {
        "mean": found.absolute / found.tokens,
        "max": found.largest,
        "square": found.square / found.tokens,
    }[measure]
    if space.kind == "heads":
        by_head = values.reshape(space.width, -1)
        return by_head.amax(1) if measure == "max" else by_head.sum(1)
    if space.kind == "values":
        shared = values.reshape(-1, space.share, space.unit)
        return (shared.amax(1) if measure == "max" else shared.mean(1)).flatten()
    return values


def shared(space: Space, factors: Tensor) -> Tensor:
    """A space's factors as factors of its site's inputs: once for every query head, [in]."""
    if space.kind != "values":
        return factors
    heads = factors.reshape(-1, 1, space.unit)
    return heads.expand(-1, space.share, -1).flatten()
