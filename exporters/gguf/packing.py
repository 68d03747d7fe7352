"""Codes and scales -> the bytes of ggml blocks. Moves bits only; nothing is quantized here.

Layouts: ``block_*`` structs of ggml-common.h. A packer takes the blocks of some rows, codes int8
[blocks, block size] and scale fields [blocks, fields per block], and returns uint8
[blocks, block bytes]. A new type is one such function and its line in `_PACKERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.types import row_bytes
from pipeline.errors import UnsupportedError, VerificationError
from pipeline.quantization.formats import GGML_FORMATS, Format, QuantizedTensor

Array = NDArray[Any]
Fields = Mapping[str, Array]

_WEIGHTS_AT_ONCE = 1 << 22  # bounds the temporaries to some tens of MB


def _half(scale: Array) -> Array:
    """Scales [blocks, n] as little-endian fp16, uint8 [blocks, 2n]."""
    return np.ascontiguousarray(scale.astype("<f2")).view(np.uint8)


def _unsigned(codes: Array, low: int) -> Array:
    """Codes counted from `low`, so that the smallest is 0."""
    return (codes.astype(np.int16) - low).astype(np.uint8)


def _nibbles(codes: Array) -> Array:
    """[n, 32] -> [n, 16]: the first half in the low nibbles, the second half in the high ones."""
    return codes[:, :16] | codes[:, 16:] << 4


def _crumbs(codes: Array) -> Array:
    """2-bit codes [..., 4, n] -> [..., n]: the four planes at bits 0, 2, 4 and 6."""
    return codes[..., 0, :] | codes[..., 1, :] << 2 | codes[..., 2, :] << 4 | codes[..., 3, :] << 6


def _q4_0(codes: Array, scales: Fields) -> Array:
    return np.hstack([_half(scales["d"]), _nibbles(_unsigned(codes, -8))])


def _q4_1(codes: Array, scales: Fields) -> Array:
    return np.hstack([_half(scales["d"]), _half(scales["m"]), _nibbles(codes.view(np.uint8))])


def _q5_0(codes: Array, scales: Fields) -> Array:
    unsigned = _unsigned(codes, -16)
    fifth_bits = np.packbits(unsigned >> 4, axis=1, bitorder="little")
    return np.hstack([_half(scales["d"]), fifth_bits, _nibbles(unsigned & 15)])


def _q8_0(codes: Array, scales: Fields) -> Array:
    return np.hstack([_half(scales["d"]), codes.view(np.uint8)])


def _q2_0(codes: Array, scales: Fields) -> Array:
    planes = _unsigned(codes, -1).reshape(-1, 16, 4).swapaxes(1, 2)
    return np.hstack([_half(scales["d"]), _crumbs(planes)])


def _q6_k(codes: Array, scales: Fields) -> Array:
    halves = _unsigned(codes, -32).reshape(-1, 2, 4, 32)
    low = halves & 15
    low_bits = low[:, :, :2] | low[:, :, 2:] << 4
    high_bits = _crumbs(halves >> 4)
    blocks = len(codes)
    return np.hstack(
        [
            low_bits.reshape(blocks, 128),
            high_bits.reshape(blocks, 64),
            scales["sc"].astype(np.int8).view(np.uint8),
            _half(scales["d"]),
        ]
    )


_PACKERS: dict[str, Callable[[Array, Fields], Array]] = {
    "Q2_0": _q2_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q6_K": _q6_k,
    "Q8_0": _q8_0,
}


def pack(tensor: QuantizedTensor) -> NDArray[np.uint8]:
    """The rows of a quantized linear as ggml stores them.

    Args:
        tensor: codes int8 [out, in] and the scale fields of its format.

    Returns:
        uint8 [out, row bytes].

    Raises:
        UnsupportedError: No ggml type stores this format, or the width is not whole blocks.
        VerificationError: Codes or scales are not values of the format (a bug in the solver).
    """
    packer = _PACKERS.get(tensor.format.name)
    if packer is None or GGML_FORMATS.get(tensor.format.name) != tensor.format:
        raise UnsupportedError(
            f"format {tensor.format.name} cannot be written to a GGUF file",
            why="llama.cpp has no tensor type that stores it",
            fix=f"quantize to one of {', '.join(sorted(_PACKERS))}",
        )
    rows, width = tensor.codes.shape
    packed = np.empty((rows, row_bytes(tensor.format.name, width)), np.uint8)
    codes = tensor.codes.detach().cpu().numpy()
    fields = {name: field.detach().cpu().numpy() for name, field in tensor.scales.items()}
    _check_codes(codes, tensor.format)
    _check_scales(fields, tensor.format, rows, width)

    block = tensor.format.super_group
    step = max(1, _WEIGHTS_AT_ONCE // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        blocks = np.ascontiguousarray(codes[part]).reshape(-1, block)
        of_part = {name: field[part].reshape(len(blocks), -1) for name, field in fields.items()}
        packed[part] = packer(blocks, of_part).reshape(-1, packed.shape[1])
    return packed


def _check_codes(codes: Array, fmt: Format) -> None:
    low, high = fmt.code_min, fmt.code_min + len(fmt.levels) - 1
    if codes.dtype != np.int8:
        raise VerificationError(f"codes of {fmt.name} are {codes.dtype}, not int8")
    if codes.size and not (low <= codes.min() and codes.max() <= high):
        raise VerificationError(
            f"codes of {fmt.name} lie in {codes.min()}..{codes.max()}",
            why=f"the format has codes {low}..{high}",
        )


def _check_scales(fields: Fields, fmt: Format, rows: int, width: int) -> None:
    groups, supers = width // fmt.group_size, width // fmt.super_group
    expected = {"d": supers}
    if fmt.affine:
        expected["m"] = groups
    if fmt.sub_scale is not None:
        expected["sc"] = groups
    shapes = {name: field.shape for name, field in fields.items()}
    if shapes != {name: (rows, count) for name, count in expected.items()}:
        raise VerificationError(
            f"scale fields of {fmt.name} have shapes {shapes}",
            why=f"{rows} rows of {width} weights need {expected} values a row",
        )
    for name, field in fields.items():
        if name == "sc":
            _check_sub_scale(field, fmt)
        else:
            _check_half(name, field, fmt)


def _check_sub_scale(field: Array, fmt: Format) -> None:
    low, high = fmt.sub_scale or (0, 0)
    inside = np.issubdtype(field.dtype, np.integer) and ((field >= low) & (field <= high)).all()
    if not inside:
        raise VerificationError(f"sub-scales of {fmt.name} are not integers in {low}..{high}")


def _check_half(name: str, field: Array, fmt: Format) -> None:
    with np.errstate(over="ignore"):
        stored = field.astype(np.float16).astype(np.float32)
    wrong = ~np.isfinite(stored) | (stored != field)
    if wrong.any():
        raise VerificationError(
            f"scale field {name!r} of {fmt.name} holds {field[wrong][0]!r}",
            why="the file stores fp16, which cannot represent this value",
        )
