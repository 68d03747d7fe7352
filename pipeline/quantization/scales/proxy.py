"""Scales for the error-feedback solver from the diagonal of its triangular factor."""

from __future__ import annotations

from dataclasses import replace

from pipeline.quantization.formats import Format
from pipeline.quantization.scales.base import BlockProblem, BlockScales
from pipeline.quantization.scales.piso import minimum, piso


def proxy_static(problem: BlockProblem, fmt: Format, *, signed: bool = True) -> BlockScales:
    """Scales that minimise ``sum_i (x_i - v_i)^2 / U_ii^2`` with ``v = s nearest(x / s)``.

    The rule Proxy-static of "Scale sensitivity in low-bit PTQ: curvature of the quantization error
    landscape" (Algorithm 2): the loss of sequential rounding is ``sum_i (x_i - v_i)^2 / U_ii^2``
    along its trajectory, here with x as it is on entry to the block. The study searches a grid of
    scales; the sweep over the transitions finds the exact minimum.

    Args:
        problem: The block. Without `inverse_root` the weights of the errors are ``diag(M)``.
        fmt: Format of the block.
        signed: Allow negative scales where the format does.
    """
    U = problem.inverse_root
    if U is not None:
        diagonal = U.diagonal().square().reciprocal()
        linear = diagonal * minimum(problem)
        problem = replace(problem, metric=diagonal.diag(), linear=linear)
    return piso(problem, fmt, signed=signed, hessian="diagonal")
