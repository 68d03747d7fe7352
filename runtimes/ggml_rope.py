"""Rotary position embedding with the arithmetic of llama.cpp (ggml_rope_cache_init in ops.cpp)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # not read from the files of llama, qwen2 and qwen3


@dataclass(frozen=True)
class Rope:
    """How positions rotate the heads.

    Attributes:
        dimensions: Rotated dimensions of a head.
        base: Theta.
        factor: Positions are divided by it; with YaRN only where the wavelength is long.
        yarn: Interpolation by parts (Peng et al. 2023, arXiv 2309.00071).
        original_context: Context length of pre-training, for YaRN.
        magnitude: Extra factor of the rotated values.
        interleaved: Pairs are neighbours (llama); otherwise the two halves of a head (qwen).
    """

    dimensions: int
    base: float
    factor: float
    yarn: bool
    original_context: int
    magnitude: float
    interleaved: bool

    def tables(self, length: int, frequency_factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 .. length - 1.

        The angle is a running float32 product over the dimensions, as in ggml: at long positions
        its error is visible in the logits.

        Args:
            length: Number of positions.
            frequency_factors: ``rope_freqs.weight``, float32 [dimensions / 2].

        Returns:
            Two float32 tensors [length, dimensions / 2].
        """
        pairs = self.dimensions // 2
        angles = np.empty((pairs, length), np.float32)
        angle = np.arange(length, dtype=np.float32)
        step = np.float32(self.base) ** np.float32(-2.0 / self.dimensions)
        for pair in range(pairs):
            angles[pair] = angle
            angle = angle * step
        if frequency_factors is not None:
            angles /= frequency_factors.numpy()[:, None]
        interpolated = angles * np.float32(1 / self.factor)
        magnitude = self.magnitude
        if self.yarn:
            share = self._extrapolated_share()[:, None]
            interpolated = interpolated * (1 - share) + angles * share
            magnitude *= 1 + 0.1 * math.log(max(self.factor, 1.0))
        theta = torch.from_numpy(interpolated.T.copy())
        return theta.cos() * magnitude, theta.sin() * magnitude

    def _extrapolated_share(self) -> np.ndarray:
        """YaRN's ramp: 1 keeps a frequency, 0 divides it by the factor; float32 [pairs]."""
        first = max(0.0, math.floor(self._pair_turning(_BETA_FAST)))
        last = min(self.dimensions - 1.0, math.ceil(self._pair_turning(_BETA_SLOW)))
        pairs = np.arange(self.dimensions // 2, dtype=np.float32)
        ramp = (pairs - np.float32(first)) / np.float32(max(0.001, last - first))
        return 1 - np.clip(ramp, 0, 1)

    def _pair_turning(self, times: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        turns = self.original_context / (times * 2 * math.pi)
        return self.dimensions * math.log(turns) / (2 * math.log(self.base))

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate queries or keys.

        Args:
            heads: float32 [..., length, dimensions].
            cos: float32 [length, dimensions / 2].
            sin: float32 [length, dimensions / 2].

        Returns:
            float32 [..., length, dimensions].
        """
        if self.interleaved:
            first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            first, second = heads.chunk(2, dim=-1)
        rotated = (first * cos - second * sin, first * sin + second * cos)
        if self.interleaved:
            return torch.stack(rotated, dim=-1).flatten(-2)
        return torch.cat(rotated, dim=-1)
