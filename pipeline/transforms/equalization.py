"""Scale moved between the tensor that writes a channel and those that read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.transforms.model import Model, columns_of, rows_of
from pipeline.transforms.operators import Scaling


def plan_equalization(model: Model, options: Mapping[str, Any]) -> None:
    """Rescale the channels of every space that is asked for."""
    for space in list(model.of_kinds(str(options["spaces"]).split("+"))):
        written, read = rows_of(model, space), columns_of(model, space, "max")
        model.change(space, Scaling(range_factors(written, read, options["alpha"])))


def range_factors(written: Tensor, read: Tensor, alpha: float) -> Tensor:
    """Factors that equalize ranges, float64 [channels].

    Cross-layer equalization (Nagel et al., arXiv 1906.04721, equation 11) has alpha 1/2: a channel
    that is written with range r1 and read with range r2 gets sqrt(r1 r2) on both sides.

    Args:
        written: r1 of each channel.
        read: r2 of each channel.
        alpha: Exponent, 0 (nothing changes) to 1 (all read ranges become alike).

    Returns:
        ``(r2 / r1)^alpha``; 1 where either is 0.
    """
    usable = (written > 0) & (read > 0)
    ratio = (read / written.where(usable, written.new_ones(()))).where(usable, read.new_ones(()))
    return ratio**alpha
