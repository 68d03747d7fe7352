"""Number formats: levels, blocks and the exact lattice of their scales."""

from __future__ import annotations

import difflib

from pipeline.errors import UnsupportedError
from pipeline.quantization.formats.base import (
    SUPER_FIELDS,
    Format,
    QuantizedTensor,
    carrying,
    group_offsets,
    group_scales,
    stored_pair,
    zero_offset,
    zero_points,
)
from pipeline.quantization.formats.codebook import Codebook
from pipeline.quantization.formats.floating import (
    E2M1_LEVELS,
    E4M3_LEVELS,
    floating_format,
    parse_floating,
)
from pipeline.quantization.formats.ggml import GGML_FORMATS
from pipeline.quantization.formats.integer import integer_format, parse_integer
from pipeline.quantization.formats.lattice import BF16, E8M0, FP16, FP32, UE4M3, ScaleLattice

__all__ = [
    "BF16",
    "E2M1_LEVELS",
    "E4M3_LEVELS",
    "E8M0",
    "FP16",
    "FP32",
    "GGML_FORMATS",
    "SUPER_FIELDS",
    "UE4M3",
    "Codebook",
    "Format",
    "QuantizedTensor",
    "ScaleLattice",
    "carrying",
    "floating_format",
    "get_format",
    "group_offsets",
    "group_scales",
    "integer_format",
    "stored_pair",
    "zero_offset",
    "zero_points",
]


def get_format(name: str) -> Format:
    """The format called `name` (case does not matter).

    Raises:
        UnsupportedError: Unknown name; lists the known ones and the nearest.
    """
    upper = name.upper()
    found = GGML_FORMATS.get(upper) or parse_integer(upper) or parse_floating(upper)
    if found is None:
        near = difflib.get_close_matches(upper, GGML_FORMATS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UnsupportedError(
            f"unknown type {name!r}",
            fix=f"{hint}known: {', '.join(sorted(GGML_FORMATS))}, INT2..INT8, INT<bits>_G<group>, "
            "UINT<bits>_G<group>, FINT<bits>_G<group>, FP4_G<group>, FP8_G<group>",
        )
    return found
