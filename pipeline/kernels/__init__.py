"""Hot loops. Each has compiled forms and a plain PyTorch twin that must agree with them.

The device is chosen by where the tensors are: Numba (`pipeline.kernels.cpu`) on the CPU, Triton
(`pipeline.kernels.gpu`) on a GPU for the dense sweep, column rounding, descent, sub-scales and
affine codes, the twin (`pipeline.kernels.twin`) for all else.
"""

from __future__ import annotations

from pipeline.kernels.affine import affine_lines, affine_offsets
from pipeline.kernels.columns import round_columns
from pipeline.kernels.descent import descend, fit_free
from pipeline.kernels.diagonal import piso_sweep_diagonal
from pipeline.kernels.lookahead import sequential_loss
from pipeline.kernels.sub_scales import SubScales, fit_sub_scales
from pipeline.kernels.sweep import SweepResult, piso_sweep
from pipeline.kernels.vectors import FittedVectors, fit_vectors

__all__ = [
    "FittedVectors",
    "SubScales",
    "SweepResult",
    "affine_lines",
    "affine_offsets",
    "descend",
    "fit_free",
    "fit_sub_scales",
    "fit_vectors",
    "piso_sweep",
    "piso_sweep_diagonal",
    "round_columns",
    "sequential_loss",
]
