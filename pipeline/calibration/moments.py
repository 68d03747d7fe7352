"""Second moments of a site's inputs, accumulated as sums with counts."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from pipeline.errors import InputError

STRIPS = 4
"""Strips that a symmetric product is cut into: 5/8 of its multiplications are done."""


class Moments:
    """Sums over calibration tokens, float64: ``H = sum x_q x_q'``, ``G = sum x_q x'``, [in, in].

    For linears whose output joins the residual stream also ``C = sum x_q (r - r_q)'``, of shape
    [in, hidden], with the two models' streams r and r_q where the output is added.

    Batches are multiplied in float32 and added in float64: the sums do not lose small batches, and
    every batch has the same shape on every run, so the same bits come out.

    Attributes:
        sums: Over tokens: ``quantized`` x_q, ``reference`` x (x_q without a float stream),
            ``target`` what stands for x in G, ``lost`` r - r_q.
        tokens: How many there were.
        weight: Sum of their weights, the number of tokens without.

    Args:
        width: Number of inputs.
        cross: Whether the float model's inputs are given too.
        mismatch: Whether ``sum (x - x_q)(x - x_q)'`` is accumulated as well (needs `cross`).
        hidden: Width of the residual stream, if C is accumulated as well (needs `cross`).
        name: What the inputs belong to, for messages.
        device: Where the inputs are and the sums are kept.
    """

    def __init__(
        self,
        width: int,
        *,
        cross: bool,
        name: str,
        mismatch: bool = False,
        hidden: int = 0,
        device: torch.device | None = None,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.hessian = zeros(width, width)
        self.cross = zeros(width, width) if cross else None
        self.mismatch = zeros(width, width) if mismatch else None
        self.residual = zeros(width, hidden) if hidden else None
        self.sums = {
            "quantized": zeros(width),
            "reference": zeros(width),
            "target": zeros(width),
            "lost": zeros(hidden),
        }
        self.tokens = 0
        self.weight = 0.0
        self._name = name

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of tokens."""
        both = copy(self)
        for name in ("hessian", "cross", "mismatch", "residual"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(both, name, None if mine is None or theirs is None else mine + theirs)
        both.tokens, both.weight = self.tokens + other.tokens, self.weight + other.weight
        both.sums = {name: value + other.sums[name] for name, value in self.sums.items()}
        return both

    def centred(self) -> Moments:
        """The moments about the means: of what is left where a bias takes care of the means."""
        about = copy(self)
        q, x, t, lost = (self.sums[n] for n in ("quantized", "reference", "target", "lost"))
        d, count = x - q, self.weight or 1.0
        about.hessian = self.hessian - q[:, None] * q / count
        if self.cross is not None:
            about.cross = self.cross - q[:, None] * t / count
        if self.mismatch is not None:
            about.mismatch = self.mismatch - d[:, None] * d / count
        if self.residual is not None:
            about.residual = self.residual - q[:, None] * lost / count
        return about

    def add(
        self,
        quantized: Tensor,
        reference: Tensor | None,
        first_sample: int,
        coefficients: Tensor | None = None,
        lost: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Add one batch.

        Args:
            quantized: Inputs of the quantized model, [samples, length, in].
            reference: Inputs of the float model at the same tokens, same shape, or None.
            first_sample: Index of the batch's first sample, for messages.
            coefficients: Share of each sample's mismatch that enters G, [samples]: x becomes
                ``x_q + a (x - x_q)`` there (`sampled_alpha`). None is all of it.
            lost: ``r - r_q``, what the quantized residual stream lost so far, [samples, length,
                hidden], or None.
            weights: How much each token counts, [samples, length]; None is 1.

        Raises:
            InputError: An input is NaN or Inf; names the site, the stream and the sample.
            ValueError: Not one coefficient per sample, or coefficients or mismatch without G.
        """
        root = None if weights is None else weights.reshape(-1, 1).to(quantized).sqrt()
        Xq = _scaled(self._checked(quantized, "quantized", first_sample), root)
        _add_gram(self.hessian, Xq)
        mean = _total(Xq, root)
        self.sums["quantized"] += mean
        if self.cross is not None and reference is not None:
            X = _scaled(self._checked(reference, "float", first_sample), root)
            self.sums["reference"] += _total(X, root)
            if self.mismatch is not None:
                _add_gram(self.mismatch, X - Xq)
            if coefficients is not None:
                if coefficients.shape != quantized.shape[:1]:
                    raise ValueError("one coefficient per sample is needed")
                share = coefficients.to(Xq).repeat_interleave(len(Xq) // len(quantized))
                X = Xq + share[:, None] * (X - Xq)
            self.sums["target"] += _total(X, root)
            self.cross += Xq.T @ X
            if self.residual is not None and lost is not None:
                R = _scaled(lost.flatten(0, 1), root)
                self.residual += Xq.T @ R
                self.sums["lost"] += _total(R, root)
        elif self.mismatch is not None or coefficients is not None:
            raise ValueError("a mismatch needs the float model's inputs and their products G")
        else:
            self.sums["reference"] += mean
            self.sums["target"] += mean
        self.tokens += len(Xq)
        self.weight += len(Xq) if weights is None else float(weights.double().sum())

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


def _scaled(X: Tensor, root: Tensor | None) -> Tensor:
    """Inputs times the roots of their tokens' weights: all sums are bilinear in such rows."""
    return X if root is None else root * X


def _total(X: Tensor, root: Tensor | None) -> Tensor:
    """Weighted sum of inputs that are scaled by the roots already."""
    return _scaled(X, root).sum(0, dtype=torch.float64)


def _add_gram(total: Tensor, X: Tensor) -> None:
    """``total += X' X``: the upper triangle strip by strip, the rest mirrored."""
    width = X.shape[1]
    step = -(-width // STRIPS)
    for start in range(0, width, step):
        strip = X[:, start : start + step].T @ X[:, start:]
        total[start : start + step, start:] += strip
        total[start + step :, start : start + step] += strip[:, step:].T
