"""Integer formats with any group size: ``INT3``, ``INT2_G16``; with integer zero points
``UINT4_G32``, with float ones ``FINT4_G32``."""

from __future__ import annotations

import re
from dataclasses import replace

from pipeline.quantization.formats.base import Format
from pipeline.quantization.formats.lattice import FLOAT_ZEROS, FP16, ScaleLattice

_NAME = re.compile(r"([UF]?)INT([2-8])(?:_G(\d+))?\Z")

FLOAT_ZERO_BITS = (2, 4)
"""Widths of codes with float zero points: those of MatMulNBits, which has them nowhere else."""

MOST_ZERO_POINT_BITS = 4
"""Each zero point is a sweep of its own: 256 of them would take minutes a layer."""


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


def zero_point_format(bits: int, group_size: int = 0, lattice: ScaleLattice = FP16) -> Format:
    """Unsigned integers ``0 .. 2^b-1`` with a scale and an integer zero point of as many bits a
    group: ``w = scale * (code - zero)``.

    Scales are positive: a negative one with the mirrored zero point reaches the same values.

    Args:
        bits: 2 to `MOST_ZERO_POINT_BITS`.
        group_size: Inputs per scale; 0 is channel-wise.
        lattice: Storage type of the scales.
    """
    suffix = f"_G{group_size}" if group_size else ""
    return Format(
        name=f"UINT{bits}{suffix}",
        levels=tuple(float(v) for v in range(1 << bits)),
        group_size=group_size,
        super_group=group_size,
        affine=True,
        signed_scale=False,
        scale_lattice=lattice,
        bits_per_weight=bits + ((16 + bits) / group_size if group_size else 0),
        zero_points=True,
    )


def float_zero_format(bits: int, group_size: int, lattice: ScaleLattice = FP16) -> Format:
    """Unsigned integers with a scale and a zero point of fp16 a group: ``w = scale * (code - z)``.

    Args:
        bits: 2 or 4.
        group_size: Inputs per scale.
        lattice: Storage type of the scales.
    """
    return replace(
        zero_point_format(bits, group_size, lattice),
        name=f"FINT{bits}_G{group_size}",
        bits_per_weight=bits + 32 / group_size,
        zero_points=False,
        zero_lattice=FLOAT_ZEROS,
    )


def parse_integer(name: str) -> Format | None:
    """The format that a name such as ``INT4_G32`` means, or None if it is not of this family."""
    match = _NAME.match(name)
    if match is None or match[3] in {"0", "00"}:
        return None
    bits, group = int(match[2]), int(match[3] or 0)
    if not match[1]:
        return integer_format(bits, group)
    if match[1] == "F":
        return float_zero_format(bits, group) if bits in FLOAT_ZERO_BITS and group else None
    return zero_point_format(bits, group) if bits <= MOST_ZERO_POINT_BITS else None
