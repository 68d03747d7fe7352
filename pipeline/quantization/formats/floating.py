"""Small floating-point formats with fp16 scales and any group size: ``FP4_G32``, ``FP8_G64``.

The level 0 exists once: a negative zero would be the same weight.
"""

from __future__ import annotations

import re

from pipeline.quantization.formats.base import Format
from pipeline.quantization.formats.lattice import FP16, ScaleLattice

_NAME = re.compile(r"FP([48])_G([1-9]\d*)\Z")

E2M1_LEVELS = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
"""E2M1 (OCP Microscaling Formats 1.0, section 5.3.3) doubled, as ggml's ``kvalues_mxfp4``."""


def _e4m3() -> tuple[float, ...]:
    """All finite values of E4M3: bias 7, subnormals in steps of 2^-9, 448 the largest."""
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    upwards = [m * 2.0**-9 for m in range(1, 8)] + normal[:-1]  # the last pattern is NaN
    return tuple([-value for value in reversed(upwards)] + [0.0] + upwards)


E4M3_LEVELS = _e4m3()
"""E4M3 (OCP 8-bit Floating Point Specification 1.0, section 5), 253 values up to 448."""


def floating_format(bits: int, group_size: int, lattice: ScaleLattice = FP16) -> Format:
    """E2M1 (4 bits, doubled) or E4M3 (8 bits) with one scale per group; code 0 is the level 0.

    Args:
        bits: 4 or 8.
        group_size: Inputs per scale.
        lattice: Storage type of the scales.
    """
    levels = {4: tuple(map(float, E2M1_LEVELS)), 8: E4M3_LEVELS}[bits]
    return Format(
        name=f"FP{bits}_G{group_size}",
        levels=levels,
        group_size=group_size,
        super_group=group_size,
        affine=False,
        signed_scale=True,
        scale_lattice=lattice,
        bits_per_weight=bits + 16 / group_size,
        code_min=-(len(levels) // 2),
    )


def parse_floating(name: str) -> Format | None:
    """The format that a name such as ``FP4_G32`` means, or None if it is not of this family."""
    match = _NAME.match(name)
    return None if match is None else floating_format(int(match[1]), int(match[2]))
