"""The quadratic that every method minimises: ``E(V) = tr((V - T) H (V - T)')``."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.errors import InputError

DAMPING_LADDER = (1.0, 10.0, 100.0, 1000.0)
"""Multiples of the requested damping that are tried, in order, until H factorises."""


@dataclass(frozen=True)
class Factor:
    """Triangular factors of H under a column order.

    Attributes:
        columns: Column order, int64 [in]: position i of the order holds column `columns[i]`.
        root: Upper triangular R with ``H = R R'``, float64 [in, in]. Its diagonal blocks give the
            Schur complement of H on a group whose later columns are still free, ``R_gg R_gg'``.
        inverse_root: Upper triangular ``U = R^-1``, ``H^-1 = U' U``, float64 [in, in].
    """

    columns: Tensor
    root: Tensor
    inverse_root: Tensor


@dataclass
class LayerObjective:
    """Second moments of the inputs that one set of linears shares.

    With X the float model's inputs and Xq the quantized model's, the output error of one row is
    ``||X w - Xq v||^2 = (v - t)' H (v - t) + const`` with ``t = H^-1 G w``.

    A linear whose output is added to the residual stream can also make good what the stream lost
    before it: with D = r - r_q, the difference of the two streams at that point, the error of the
    sum is ``||D + X W' - Xq V'||^2`` and its optimum adds ``(H^-1 Xq' D)'`` to the targets.

    Attributes:
        hessian: ``H = Xq' Xq`` with damping on its diagonal, [in, in], float64.
        cross: ``G = Xq' X`` with the same damping, [in, in], or None for symmetric calibration.
        residual: ``C = Xq' D``, [in, out], or None if the output is not added to the stream.
        damping: What was added to the diagonal.
        dead_inputs: Inputs that were zero on every calibration token.
        damping_raised: Steps of `DAMPING_LADDER` that were needed beyond the first.
        shrinkage: Ridge penalty on the targets, see `target`.
    """

    hessian: Tensor
    cross: Tensor | None
    damping: float
    dead_inputs: int
    damping_raised: int
    _lower: Tensor = field(repr=False)
    residual: Tensor | None = None
    shrinkage: float = 0.0

    @classmethod
    def from_moments(
        cls,
        hessian: Tensor,
        cross: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        damping: float = 0.01,
        shrinkage: float = 0.0,
    ) -> LayerObjective:
        """Damp the accumulated sums until H is positive definite.

        Args:
            hessian: Sum of ``x_q x_q'`` over tokens, [in, in].
            cross: Sum of ``x_q x'`` over tokens, [in, in], or None.
            residual: Sum of ``x_q (r - r_q)'`` over tokens, [in, out], or None.
            damping: Fraction of the mean diagonal that is added to the diagonal.
            shrinkage: Ridge penalty on the targets, in units of what damping added.

        Raises:
            InputError: The sums are not finite, or stay indefinite on the whole damping ladder.
        """
        for name, matrix in (("H", hessian), ("G", cross), ("C", residual)):
            if matrix is not None and not torch.isfinite(matrix).all():
                raise InputError(
                    f"the calibration matrix {name} holds NaN or Inf",
                    why="an activation overflowed, or the weights before this layer are not finite",
                    fix="check the checkpoint, and the calibration text for degenerate samples",
                )
        H = hessian.double()
        H = (H + H.T) / 2
        diagonal = H.diagonal()
        mean = float(diagonal.mean())
        unit = mean if mean > 0 else 1.0
        identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
        for raised, multiple in enumerate(DAMPING_LADDER):
            added = max(damping, 1e-12) * multiple * unit
            damped = H + added * identity
            lower, info = torch.linalg.cholesky_ex(damped)
            if int(info) == 0:
                G = None if cross is None else cross.double() + added * identity
                dead = int((diagonal <= 0).sum())
                C = None if residual is None else residual.double()
                return cls(damped, G, added, dead, raised, lower, C, shrinkage * added)
        raise InputError(
            "the calibration matrix H is not positive definite",
            why=f"it stays indefinite with {DAMPING_LADDER[-1]:g} times the damping of {damping:g}",
            fix="use more calibration tokens than inputs, or raise quantization.damping",
        )

    @classmethod
    def identity(cls, width: int) -> LayerObjective:
        """The data-free objective ``||v - w||^2``."""
        eye = torch.eye(width, dtype=torch.float64)
        return cls(eye, None, 0.0, 0, 0, eye)

    def target(self, weight: Tensor, alpha: float | Tensor = 1.0, beta: float = 0.0) -> Tensor:
        """The float weights that rounding aims at, float64 [out, in].

        ``T = W + (alpha W (G - H)' + beta C') H^-1``: alpha 0 is symmetric calibration (GPTQ),
        alpha 1 the optimum of ``||X W' - Xq V'||^2`` (Qronos, arXiv 2505.11695), values between
        shrink the correction (CoreQ, arXiv 2602.05902). With beta 1 as well it is the optimum of
        the residual stream after the linear.

        A ridge penalty p subtracts ``p W H^-1``: with p equal to the damping and alpha 1 the target
        is ``G0 W (H0 + p I)^-1`` of the undamped sums, the ridge regression of the float outputs on
        the quantized inputs. It makes weights smaller, not closer to the float ones.

        Args:
            weight: Float weights, [out, in].
            alpha: Share of the correction for differing inputs, 0 to 1, or one a row, [out, 1].
            beta: Share of the correction of the residual stream, 0 to 1.
        """
        W = weight.double()
        shift = torch.zeros_like(W)
        if self.cross is not None:
            shift += alpha * (W @ (self.cross - self.hessian).T)
        if self.residual is not None and beta:
            shift += beta * self.residual.T
        if self.shrinkage:
            shift -= self.shrinkage * W
        if not shift.any():
            return W
        return W + torch.cholesky_solve(shift.T, self._lower).T

    def loss(self, candidate: Tensor, target: Tensor) -> Tensor:
        """``(v - t)' H (v - t)`` of every row, float64 [out]."""
        difference = candidate.double() - target
        return ((difference @ self.hessian) * difference).sum(1)

    def factor(self, columns: Tensor) -> Factor:
        """Factors of H with its columns taken in the given order, int64 [in]."""
        H = self.hessian[columns][:, columns]
        # An upper root comes from the lower one of the matrix read backwards.
        root = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
        identity = torch.eye(len(H), dtype=H.dtype, device=H.device)
        inverse_root = torch.linalg.solve_triangular(root, identity, upper=True)
        return Factor(columns, root, inverse_root)


@dataclass(frozen=True)
class HeldOut:
    """Second moments of tokens that no solver has seen: the judge of refinements.

    Attributes:
        hessian: ``H = Xq' Xq``, [in, in], undamped.
        cross: ``G = Xq' X``, [in, in]; None: the same as H.
        residual: ``C = Xq' (r - r_q)``, [in, out], or None.
    """

    hessian: Tensor
    cross: Tensor | None = None
    residual: Tensor | None = None

    def loss(self, candidate: Tensor, weight: Tensor) -> float:
        """Squared error of the outputs, ``||D + X W' - Xq V'||^2``, up to a constant.

        Args:
            candidate: V, [out, in].
            weight: The float weights W, [out, in].
        """
        V, W, H = candidate.double(), weight.double(), self.hessian
        linear = W @ (H if self.cross is None else self.cross).T
        if self.residual is not None:
            linear = linear + self.residual.T
        return float(((V @ H - 2 * linear) * V).sum())
