"""Descent on orthogonal matrices, and the loss that rotations are learned on.

A rotation A of the residual stream (``x' = A x``) turns a matrix that reads it into ``W A'`` and
one that writes it into ``A W``. With Q what the quantizer makes of those, and H the second moments
of the inputs in the old coordinates, the errors of the outputs are

    reads:  tr((W - Q A) H (W - Q A)')        writes:  tr((A W - Q) H (A W - Q)')

where the reading error is taken back into the old coordinates. Under a fixed Q both are smooth in
A; after a step the matrix is quantized again. So the rotation is learned against the quantizer that
will be used. SpinQuant (arXiv 2405.16406) descends on the loss of the whole network, with its
activations quantized, see `pipeline.transforms.network`; this needs one decoder block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Quantize = Callable[[Tensor], Tensor]
"""From a matrix to the one that its codes and scales stand for."""


@dataclass(frozen=True)
class Linear:
    """A matrix that sees the rotated channels.

    Attributes:
        weight: In the old coordinates, float64 [out, in].
        hessian: ``sum x x'`` of its inputs in the old coordinates, float64 [in, in].
        reads: Whether its inputs are the channels; else its outputs are.
        quantize: What will be done to it.
    """

    weight: Tensor
    hessian: Tensor
    reads: bool
    quantize: Quantize

    @property
    def energy(self) -> float:
        """``tr(W H W')``, by which losses are made comparable."""
        return max(float(((self.weight @ self.hessian) * self.weight).sum()), 1e-300)

    def rotated(self, A: Tensor) -> Tensor:
        """The matrix in the new coordinates."""
        return self.weight @ A.T if self.reads else A @ self.weight

    def loss_and_gradient(self, A: Tensor, Q: Tensor) -> tuple[float, Tensor]:
        """Relative squared error of the outputs, and its gradient in A under this fixed Q."""
        error = self.weight - Q @ A if self.reads else A @ self.weight - Q
        weighted = error @ self.hessian
        loss = float((weighted * error).sum()) / self.energy
        gradient = -2 * Q.T @ weighted if self.reads else 2 * weighted @ self.weight.T
        return loss, gradient / self.energy


def cayley_step(A: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """A step along the gradient that stays orthogonal, [..., n, n].

    The gradient's part that is tangent to the orthogonal matrices is ``S A`` with the skew matrix
    ``S = G A' - A G'``; the Cayley transform ``(I + r/2 S)^-1 (I - r/2 S) A`` follows it (Li, Fuxin
    and Todorovic, arXiv 2002.01113, section 3; solved exactly instead of by iteration).

    Args:
        A: Orthogonal.
        gradient: Of the loss in A.
        rate: Length of the step.
    """
    product = gradient @ A.mT
    skew = (product - product.mT) * (rate / 2)
    unit = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(unit + skew, (unit - skew) @ A)


def total_loss(A: Tensor, linears: Sequence[Linear]) -> float:
    """Mean relative error of the linears, each quantized in the new coordinates."""
    losses = [one.loss_and_gradient(A, one.quantize(one.rotated(A)))[0] for one in linears]
    return sum(losses) / len(losses)


def learn_rotation(
    start: Tensor, groups: Sequence[Sequence[Linear]], *, steps: int, rate: float
) -> tuple[Tensor, float, float]:
    """Descend from a rotation, a group of linears a step, in turn.

    Args:
        start: Orthogonal, float64 [n, n].
        groups: Linears by decoder block.
        steps: How many.
        rate: Length of the first step, in units of the gradient's largest singular value; falls
            linearly to nothing.

    Returns:
        The best rotation that was seen, by the loss over all groups: after each round of them, or
        the first; with the loss at the start and at the end.
    """
    everything = [one for group in groups for one in group]
    first = least = total_loss(start, everything)
    best, A = start, start
    for step in range(steps):
        group = groups[step % len(groups)]
        gradient = torch.zeros_like(A)
        for one in group:
            gradient += one.loss_and_gradient(A, one.quantize(one.rotated(A)))[1]
        size = float(torch.linalg.matrix_norm(gradient, 2))
        if size > 0:
            A = cayley_step(A, gradient, rate * (1 - step / steps) / size)
        if (step + 1) % len(groups) == 0 or step + 1 == steps:
            loss = total_loss(A, everything)
            if loss < least:
                best, least = A, loss
    return best, first, least
