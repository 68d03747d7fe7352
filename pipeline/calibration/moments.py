"""Second moments of a site's inputs, accumulated as sums with counts."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import InputError


class Moments:
    """``H = sum x_q x_q'`` and ``G = sum x_q x'`` over calibration tokens, float64 [in, in].

    Batches are multiplied in float32 and added in float64: the sums do not lose small batches, and
    every batch has the same shape on every run, so the same bits come out.

    Args:
        width: Number of inputs.
        cross: Whether the float model's inputs are given too.
        name: What the inputs belong to, for messages.
    """

    def __init__(self, width: int, *, cross: bool, name: str) -> None:
        self.hessian = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(width, width, dtype=torch.float64) if cross else None
        self.tokens = 0
        self._name = name

    def add(self, quantized: Tensor, reference: Tensor | None, first_sample: int) -> None:
        """Add one batch.

        Args:
            quantized: Inputs of the quantized model, [samples, length, in].
            reference: Inputs of the float model at the same tokens, same shape, or None.
            first_sample: Index of the batch's first sample, for messages.

        Raises:
            InputError: An input is NaN or Inf; names the site, the stream and the sample.
        """
        Xq = self._checked(quantized, "quantized", first_sample)
        self.hessian += Xq.T @ Xq
        if self.cross is not None and reference is not None:
            self.cross += Xq.T @ self._checked(reference, "float", first_sample)
        self.tokens += len(Xq)

    def _checked(self, inputs: Tensor, stream: str, first_sample: int) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        # A sum is finite only if every term is, and costs a fraction of isfinite().all().
        if not torch.isfinite(flat.sum()):
            finite = torch.isfinite(inputs).flatten(1).all(1)
            if not finite.all():
                sample = first_sample + int((~finite).nonzero()[0])
                raise InputError(
                    f"{self._name}: the {stream} model's input is NaN or Inf",
                    why=f"first at calibration sample {sample}",
                    fix="look at that sample's text, and at the weights before this layer",
                )
        return flat
