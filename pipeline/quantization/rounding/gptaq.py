"""GPTAQ: the sequential solver with the input mismatch carried column by column."""

from __future__ import annotations

from torch import Tensor

from pipeline.quantization.objective import Factor


def gptaq_drift(hessian: Tensor, cross: Tensor, factor: Factor, alpha: float = 0.25) -> Tensor:
    """What every column adds to the columns after it for the mismatch of its own input.

    While later columns are free, the mismatch ``w_i (x_i - xq_i)`` of column i is best absorbed by
    adding ``w_i d_i F_i^-1`` to them, with d_i the products of ``x_i - xq_i`` with their quantized
    inputs and F_i their block of H. All rows at once are ``alpha triu(D U', 1) U`` with
    ``D = (G - H)'`` and ``H^-1 = U'U`` (GPTAQ, arXiv 2504.02692; 0.25 is its authors' default).

    Args:
        hessian: H, [in, in]; the same damping must be on both matrices.
        cross: ``G = Xq' X``, [in, in].
        factor: Factors of H in solver order.
        alpha: Share of the correction, 0 to 1.

    Returns:
        Strictly upper triangular P in solver order, float64 [in, in], for `solve_sequential`.
    """
    columns, U = factor.columns, factor.inverse_root
    difference = (cross.double() - hessian.double()).T[columns][:, columns]
    return alpha * (difference @ U.T).triu(1) @ U
