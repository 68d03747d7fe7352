"""ggml types by name: row sizes, and the file type that a GGUF file announces."""

from __future__ import annotations

from exporters.gguf.type_sizes import GGML_TYPES, GGMLType
from pipeline.errors import UnsupportedError

_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}

# `enum llama_ftype` of llama.h. Pure files of a type that only names mixes announce the plainest.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q3_K": 11,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K": 14,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K": 16,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K": 10,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4": 38,
    "NVFP4": 39,
    "Q1_0": 40,
    "Q2_0": 41,
}


def ggml_type(name: str) -> GGMLType:
    """The type called `name`, upper case.

    Raises:
        UnsupportedError: A model file cannot hold such a type.
    """
    if name not in _FILE_TYPES or name not in _BY_NAME:
        known = ", ".join(known for known in _FILE_TYPES if known in _BY_NAME)
        raise UnsupportedError(
            f"no ggml type for weights is called {name!r}", fix=f"known: {known}"
        )
    return _BY_NAME[name]


def file_type(name: str) -> int:
    """``general.file_type`` of a file made mostly of this type, or of a mix.

    Raises:
        UnsupportedError: A model file cannot hold such a type.
    """
    if name not in _FILE_TYPES:
        raise UnsupportedError(
            f"no type or mix of files is called {name!r}", fix=f"known: {', '.join(_FILE_TYPES)}"
        )
    return _FILE_TYPES[name]


def row_bytes(type_name: str, width: int) -> int:
    """Bytes of a row of `width` weights.

    Raises:
        UnsupportedError: Unknown type, or `width` is not a whole number of blocks.
    """
    kind = ggml_type(type_name)
    if width <= 0 or width % kind.block:
        raise UnsupportedError(
            f"rows of {width} weights do not fit {type_name}",
            why=f"{type_name} stores blocks of {kind.block} weights along the input dimension",
            fix=f"choose a type whose block divides {width}",
        )
    return width // kind.block * kind.nbytes
