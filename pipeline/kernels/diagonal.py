"""Piecewise Scale Optimization of one scale per row under a diagonal Hessian."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.kernels.sweep import SweepResult, lattice_limits
from pipeline.kernels.twin import diagonal as twin
from pipeline.quantization.formats import ScaleLattice


def piso_sweep_diagonal(
    weights: Tensor,
    diagonal: Tensor,
    linear: Tensor,
    levels: Tensor,
    *,
    signed: bool,
    lattice: ScaleLattice | None = None,
    clamp: bool = True,
) -> SweepResult:
    """Exact minimum over s of ``sum_i h_i (s q_i)^2 - 2 s q_i b_i``, ``q = nearest(w / s)``.

    `piso_sweep` on a diagonal matrix (arXiv 2606.10890 with a diagonal Hessian), in
    O(N log N) for the N transition scales of a row: a transition from level l to l' changes q'b by
    ``(l' - l) b_i`` and q'Hq by ``h_i (l'^2 - l^2)``, whatever the other codes are, so both are
    prefix sums over the sorted transitions.

    Args:
        weights: [rows, inputs]; the values that are rounded.
        diagonal: h >= 0, [inputs], or [rows, inputs] if it differs between rows.
        linear: b, [rows, inputs] (``weights * diagonal`` when only rounding separates the two).
        levels: Sorted levels at scale 1, [levels].
        signed: Also search negative scales.
        lattice: Storage lattice of the scale; None allows any real number.
        clamp: As in `piso_sweep`. It does not change the minimum where ``b = h w``: rounding to
            nearest is then the best choice of codes at every scale.

    Raises:
        InputError: The diagonal has neither shape.
    """
    if diagonal.shape not in (weights.shape, weights.shape[1:]):
        raise InputError(
            f"a Hessian diagonal of shape {list(diagonal.shape)} for weights {list(weights.shape)}",
            fix="give one value per input, or one per weight",
        )
    per_row = diagonal.reshape(-1, weights.shape[1])
    w, h, b, grid = (t.double().contiguous() for t in (weights, per_row, linear, levels))
    limits = (signed, clamp, *lattice_limits(lattice))
    if weights.device.type != "cpu":
        return SweepResult(*twin.piso_sweep_diagonal(w, h, b, grid, *limits))
    from pipeline.kernels.cpu import diagonal as compiled

    arrays = (w.numpy(), h.numpy(), b.numpy(), grid.numpy())
    out = compiled.piso_sweep_diagonal(*arrays, *limits)
    return SweepResult(*(torch.from_numpy(a) for a in out))
