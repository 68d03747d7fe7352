"""Codes and scales of packed rows: the inverse of `packing`, for types that can be taken over.

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
from pipeline.quantization.formats import Format, QuantizedTensor, get_format

Array = NDArray[Any]


def _q4_0(packed: Array) -> Array:
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int8) - np.int8(8)


def _q2_0(packed: Array) -> Array:
    planes = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return planes.reshape(*packed.shape[:-1], -1).astype(np.int8) - np.int8(1)


def _q8_0(packed: Array) -> Array:
    return packed.view(np.int8)


def _nvfp4(packed: Array) -> Array:
    """Magnitudes in 3 bits under a sign; the negative zero becomes -1, which is no code."""
    quarters = packed.reshape(*packed.shape[:-1], 4, 8)
    stored = np.concatenate([quarters & 15, quarters >> 4], axis=-1).astype(np.int8)
    codes = np.where(stored < 8, 7 + stored, 15 - stored)
    return np.where(stored == 8, -1, codes).astype(np.int8)


def _halves(stored: Array) -> Array:
    return np.ascontiguousarray(stored).view("<f2").astype(np.float32)


def _e4m3(stored: Array) -> Array:
    """Halved, see `pipeline.quantization.formats.lattice`; a sign or no number becomes NaN."""
    numbers = torch.from_numpy(np.ascontiguousarray(stored)).view(torch.float8_e4m3fn)
    halved = numbers.float().numpy() / 2
    return np.where(stored < 0x7F, halved, np.float32(np.nan))


_UNPACKERS = {
    "Q4_0": (2, _halves, _q4_0),
    "Q2_0": (2, _halves, _q2_0),
    "Q8_0": (2, _halves, _q8_0),
    "NVFP4": (4, _e4m3, _nvfp4),
}
"""Bytes of scales at the beginning of a block, what they say, and what the others say."""


def unpack(
    rows: NDArray[np.uint8], type_name: str, width: int, tensor_scale: float | None = None
) -> QuantizedTensor:
    """Codes and scales of rows as ggml stores them.

    Args:
        rows: uint8 [out, row bytes].
        type_name: Q4_0, Q2_0, Q8_0 or NVFP4.
        width: Weights in a row.
        tensor_scale: Scale of the whole tensor, for NVFP4; None if the file has none.

    Raises:
        UnsupportedError: Another type.
        InputError: Rows of another size, a scale that is not finite, or a code or tensor scale that
            we do not write.
    """
    if type_name not in _UNPACKERS:
        raise UnsupportedError(
            f"codes of {type_name} cannot be taken over",
            why="they are not levels under one scale a group",
            fix=f"deploy in one of {', '.join(_UNPACKERS)}",
        )
    fmt = _at_tensor_scale(get_format(type_name), tensor_scale)
    if rows.ndim != 2 or rows.shape[1] != row_bytes(type_name, width):
        raise InputError(f"rows of {rows.shape[-1]} bytes do not hold {width} weights")
    at, scales_of, codes_of = _UNPACKERS[type_name]
    blocks = np.ascontiguousarray(rows).reshape(len(rows), width // fmt.stored_block(width), -1)
    d = scales_of(blocks[..., :at]).reshape(len(rows), -1) * np.float32(fmt.tensor_scale or 1.0)
    codes = codes_of(np.ascontiguousarray(blocks[..., at:])).reshape(len(rows), width)
    if not np.isfinite(d).all() or codes.min() < fmt.code_min:
        raise InputError(f"a scale or code of {type_name} is none that this project writes")
    return QuantizedTensor(
        fmt, torch.from_numpy(np.ascontiguousarray(codes)), {"d": torch.from_numpy(d)}
    )


def _at_tensor_scale(fmt: Format, scale: float | None) -> Format:
    if scale is None:
        return fmt
    try:
        return fmt.at_tensor_scale(scale)
    except ValueError as error:
        raise InputError(str(error), why="this project writes powers of two, to NVFP4") from None
