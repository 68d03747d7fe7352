"""The set of values that a stored scale can take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScaleLattice:
    """Floating-point numbers with a fixed significand width, a smallest step and a largest value.

    Attributes:
        name: Name of the storage type.
        significand_bits: Significant bits including the implicit one (fp16: 11, power of two: 1).
        min_step_exponent: log2 of the spacing of subnormal numbers (fp16: -24).
        max_value: Largest finite magnitude.
        signed: Whether negative values can be stored.
    """

    name: str
    significand_bits: int
    min_step_exponent: int
    max_value: float
    signed: bool = True

    def _step(self, magnitude: Tensor) -> Tensor:
        """Spacing of the lattice at `magnitude` (any shape, float64)."""
        _, exponent = torch.frexp(magnitude)
        step = (exponent - self.significand_bits).clamp_min(self.min_step_exponent)
        return torch.ldexp(torch.ones_like(magnitude), step)

    def neighbours(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The closest lattice points at or below and at or above each value.

        Args:
            values: Any shape. Values beyond the lattice's range are clamped to it first.

        Returns:
            (below, above), same shape and dtype as `values`; equal for points of the lattice.
        """
        low = -self.max_value if self.signed else 0.0
        wide = values.double().clamp(low, self.max_value)
        step = self._step(wide.abs())
        below, above = torch.floor(wide / step) * step, torch.ceil(wide / step) * step
        return below.to(values.dtype), above.clamp_max(self.max_value).to(values.dtype)

    def round(self, values: Tensor) -> Tensor:
        """Nearest lattice point (ties to even significand), same shape and dtype as `values`."""
        low = -self.max_value if self.signed else 0.0
        wide = values.double().clamp(low, self.max_value)
        step = self._step(wide.abs())
        rounded = torch.round(wide / step) * step
        return rounded.clamp(low, self.max_value).to(values.dtype)

    def shifted(self, exponent: int) -> ScaleLattice:
        """All points times ``2 ** exponent``, as under a scale that is stored once a tensor."""
        return replace(
            self,
            min_step_exponent=self.min_step_exponent + exponent,
            max_value=self.max_value * 2.0**exponent,
        )


FP32 = ScaleLattice("fp32", 24, -149, 3.4028234663852886e38)
FP16 = ScaleLattice("fp16", 11, -24, 65504.0)
BF16 = ScaleLattice("bf16", 8, -133, 3.3895313892515355e38)
FLOAT_ZEROS = ScaleLattice("fp16 zero point", 11, -12, 2048.0)
"""Zero points that fp16 holds and that are multiples of 2^-12: a code minus a zero point, and a
scale times a zero point, are then exact in float32, and ``s (q - z)`` rounds once in any order."""

E8M0 = ScaleLattice("e8m0", 1, -128, 2.0**127, signed=False)
"""Powers of two as MXFP4 in ggml stores them, halved to meet its doubled levels; and 0."""
UE4M3 = ScaleLattice("ue4m3", 4, -10, 224.0, signed=False)
"""Unsigned FP8 (E4M3, at most 448, subnormal below 2^-6) as NVFP4 in ggml stores it, halved to meet
its doubled levels."""
