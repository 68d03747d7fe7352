"""Symmetric integer formats with any group size, for research: ``INT3``, ``INT2_G16``."""

from __future__ import annotations

import re

from pipeline.quantization.formats.base import Format
from pipeline.quantization.formats.lattice import FP16, ScaleLattice

_NAME = re.compile(r"INT([2-8])(?:_G(\d+))?\Z")


def integer_format(bits: int, group_size: int = 0, lattice: ScaleLattice = FP16) -> Format:
    """Two's complement integers ``-2^(b-1) .. 2^(b-1)-1`` with one signed scale per group.

    Args:
        bits: 2 to 8.
        group_size: Inputs per scale; 0 is channel-wise.
        lattice: Storage type of the scales.
    """
    low = -(1 << (bits - 1))
    suffix = f"_G{group_size}" if group_size else ""
    return Format(
        name=f"INT{bits}{suffix}",
        levels=tuple(float(v) for v in range(low, -low)),
        group_size=group_size,
        super_group=group_size,
        affine=False,
        signed_scale=True,
        scale_lattice=lattice,
        bits_per_weight=bits + (16 / group_size if group_size else 0),
        code_min=low,
    )


def parse_integer(name: str) -> Format | None:
    """The format that a name such as ``INT4_G32`` means, or None if it is not of this family."""
    match = _NAME.match(name)
    if match is None or match[2] in {"0", "00"}:
        return None
    return integer_format(int(match[1]), int(match[2] or 0))
