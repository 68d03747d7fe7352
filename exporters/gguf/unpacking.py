"""Codes and scales of packed rows: the inverse of `packing`, for types that other files hold too.

The decoders that prove files (`runtimes.ggml_types`) give weights, from which codes under a scale
of 0 could not be told.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.gguf.types import row_bytes
from pipeline.errors import InputError, UnsupportedError
from pipeline.quantization.formats import QuantizedTensor, get_format

Array = NDArray[Any]


def _q4_0(packed: Array) -> Array:
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int8) - np.int8(8)


def _q2_0(packed: Array) -> Array:
    planes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return planes.reshape(*packed.shape[:-1], -1).astype(np.int8) - np.int8(1)


def _q8_0(packed: Array) -> Array:
    return packed.view(np.int8)


_UNPACKERS = {"Q4_0": _q4_0, "Q2_0": _q2_0, "Q8_0": _q8_0}


def unpack(rows: NDArray[np.uint8], type_name: str, width: int) -> QuantizedTensor:
    """Codes and scales of rows as ggml stores them.

    Args:
        rows: uint8 [out, row bytes].
        type_name: Q4_0, Q2_0 or Q8_0.
        width: Weights in a row.

    Raises:
        UnsupportedError: Another type.
        InputError: Rows of another size, a scale that is not finite, or a code that we do not
            write.
    """
    if type_name not in _UNPACKERS:
        raise UnsupportedError(
            f"codes of {type_name} cannot be taken over",
            why="they are not integers under one fp16 scale a group",
            fix=f"deploy in one of {', '.join(_UNPACKERS)}",
        )
    fmt = get_format(type_name)
    if rows.ndim != 2 or rows.shape[1] != row_bytes(type_name, width):
        raise InputError(f"rows of {rows.shape[-1]} bytes do not hold {width} weights")
    blocks = np.ascontiguousarray(rows).reshape(len(rows), width // fmt.group_size, -1)
    d = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    codes = _UNPACKERS[type_name](np.ascontiguousarray(blocks[..., 2:])).reshape(len(rows), width)
    if not np.isfinite(d).all() or codes.min() < fmt.code_min:
        raise InputError(f"a scale or code of {type_name} is none that this project writes")
    return QuantizedTensor(
        fmt, torch.from_numpy(np.ascontiguousarray(codes)), {"d": torch.from_numpy(d)}
    )
