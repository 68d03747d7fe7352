"""The block formats of ggml that are stored as codes and scales (ggml-common.h).

Codes of integer formats are the integers; those of table formats count the table from its smallest
value.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.quantization.formats.base import Format
from pipeline.quantization.formats.codebook import Codebook
from pipeline.quantization.formats.floating import E2M1_LEVELS
from pipeline.quantization.formats.lattice import E8M0, FP16, UE4M3, ScaleLattice

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""Table of the non-linear 4-bit types (``kvalues_iq4nl``)."""

IQ2_MAGNITUDES = (8, 25, 43)
IQ3_XXS_MAGNITUDES = (4, 12, 20, 28, 36, 44, 52, 62)


def _plain(
    name: str,
    levels: tuple[int, ...] | range,
    group: int,
    nbytes: int,
    *,
    integer: bool = True,
    affine: bool = False,
    lattice: ScaleLattice = FP16,
) -> Format:
    """One scale (and offset) a group."""
    return Format(
        name=name,
        levels=tuple(float(v) for v in levels),
        group_size=group,
        super_group=group,
        affine=affine,
        signed_scale=lattice.signed,
        scale_lattice=lattice,
        bits_per_weight=8 * nbytes / group,
        code_min=levels[0] if integer else 0,
    )


def _hierarchical(
    name: str,
    levels: tuple[int, ...] | range,
    group: int,
    nbytes: int,
    sub_scale: tuple[int, int],
    *,
    integer: bool = True,
    sub_offset: tuple[int, int] | None = None,
) -> Format:
    """Integer sub-scales (and sub-offsets) under super-scales of 256 weights."""
    return Format(
        name=name,
        levels=tuple(float(v) for v in levels),
        group_size=group,
        super_group=256,
        affine=sub_offset is not None,
        signed_scale=True,
        scale_lattice=FP16,
        bits_per_weight=8 * nbytes / 256,
        code_min=levels[0] if integer else 0,
        sub_scale=sub_scale,
        sub_offset=sub_offset,
    )


def _codebook(
    name: str,
    magnitudes: tuple[int, ...] | range,
    unit: int,
    group: int,
    nbytes: int,
    *,
    even: bool,
) -> Format:
    """Vectors of a codebook under 4-bit sub-scales s, which count as ``2 s + 1``.

    The C library multiplies ``d (0.5 + s) / 4`` (IQ2), ``d (0.5 + s) / 2`` (IQ3_XXS) or
    ``d (1 + 2 s)`` (IQ3_S) by a magnitude and a sign: in units of 8, 4 or 1 the same product, which
    fits float32 in whatever order it is formed. Signs are codes, so that no scale needs one.
    """
    upwards = [value / unit for value in magnitudes]
    return Format(
        name=name,
        levels=tuple([-value for value in reversed(upwards)] + upwards),
        group_size=group,
        super_group=256,
        affine=False,
        signed_scale=False,
        scale_lattice=FP16,
        bits_per_weight=8 * nbytes / 256,
        sub_scale=(1, 31),
        sub_step=2,
        codebook=Codebook(name, even),
    )


_FORMATS = (
    _plain("Q2_0", range(-1, 3), 64, 18),
    _plain("Q4_0", range(-8, 8), 32, 18),
    _plain("Q4_1", range(16), 32, 20, affine=True),
    _plain("Q5_0", range(-16, 16), 32, 22),
    _plain("Q5_1", range(32), 32, 24, affine=True),
    _plain("Q8_0", range(-127, 128), 32, 34),
    _plain("IQ4_NL", IQ4_LEVELS, 32, 18, integer=False),
    _plain("TQ1_0", range(-1, 2), 256, 54),
    _plain("TQ2_0", range(-1, 3), 256, 66),
    _plain("MXFP4", E2M1_LEVELS, 32, 17, integer=False, lattice=E8M0),
    replace(
        _plain("NVFP4", E2M1_LEVELS, 16, 9, integer=False, lattice=UE4M3),
        storage_block=64,
        tensor_scale=1.0,
    ),
    _hierarchical("Q2_K", range(4), 16, 84, (0, 15), sub_offset=(0, 15)),
    _hierarchical("Q3_K", range(-4, 4), 16, 110, (-32, 31)),
    _hierarchical("Q4_K", range(16), 32, 144, (0, 63), sub_offset=(0, 63)),
    _hierarchical("Q5_K", range(32), 32, 176, (0, 63), sub_offset=(0, 63)),
    _hierarchical("Q6_K", range(-32, 32), 16, 210, (-128, 127)),
    _hierarchical("IQ4_XS", IQ4_LEVELS, 32, 136, (-32, 31), integer=False),
    _codebook("IQ2_XXS", IQ2_MAGNITUDES, 8, 32, 66, even=True),
    _codebook("IQ2_XS", IQ2_MAGNITUDES, 8, 16, 74, even=True),
    _codebook("IQ2_S", IQ2_MAGNITUDES, 8, 16, 82, even=False),
    _codebook("IQ3_XXS", IQ3_XXS_MAGNITUDES, 4, 32, 98, even=True),
    _codebook("IQ3_S", range(1, 16, 2), 1, 32, 110, even=False),
)

GGML_FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in _FORMATS}
