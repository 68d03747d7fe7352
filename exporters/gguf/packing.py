"""Codes and scales -> the bytes of ggml blocks. Moves bits only; nothing is quantized here.

Layouts: ``block_*`` structs of ggml-common.h. A packer takes the blocks of some rows, codes int8
[blocks, block size] and scale fields [blocks, fields per block], and returns uint8
[blocks, block bytes]. A new type is one such function and its line in `_PACKERS`. Types with a
codebook are in `exporters.gguf.packing_codebooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.gguf.packing_codebooks import CODEBOOK_PACKERS
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


def _q5_1(codes: Array, scales: Fields) -> Array:
    unsigned = codes.view(np.uint8)
    fifth_bits = np.packbits(unsigned >> 4, axis=1, bitorder="little")
    fields = [_half(scales["d"]), _half(scales["m"])]
    return np.hstack([*fields, fifth_bits, _nibbles(unsigned & 15)])


def _iq4_nl(codes: Array, scales: Fields) -> Array:
    return np.hstack([_half(scales["d"]), _nibbles(codes.view(np.uint8))])


def _mxfp4(codes: Array, scales: Fields) -> Array:
    """A power of two as its exponent; magnitudes in 3 bits under a sign."""
    d = scales["d"][:, 0]
    exponent = np.where(d > 0, np.frexp(d)[1] + 127, 0).astype(np.uint8)
    level = np.where(d[:, None] > 0, codes.astype(np.int16) - 7, 0)  # 7 is the level 0
    stored = np.where(level < 0, 8 - level, level).astype(np.uint8)
    return np.hstack([exponent[:, None], _nibbles(stored)])


def _nvfp4(codes: Array, scales: Fields) -> Array:
    """Four bytes of E4M3 without sign, then the nibbles of 16 weights each, as MXFP4 has them."""
    d = scales["d"].astype(np.float64) * 2  # halved in the lattice
    exponent = np.where(d > 0, np.maximum(np.frexp(d)[1] - 1, -6), -6)
    steps = np.ldexp(d, 3 - exponent)  # 0..7 below 2^-6, else 8..15
    e4m3 = ((exponent + 6) * 8 + steps).astype(np.uint8)
    level = np.where(np.repeat(d, 16, axis=1) > 0, codes.astype(np.int16) - 7, 0)
    stored = np.where(level < 0, 8 - level, level).astype(np.uint8).reshape(-1, 4, 2, 8)
    nibbles = stored[:, :, 0] | stored[:, :, 1] << 4
    return np.hstack([e4m3, nibbles.reshape(-1, 32)])


def _tq1_0(codes: Array, scales: Fields) -> Array:
    """Five ternary digits a byte, first digit first: ``ceil(value * 256 / 243)``; then four."""
    digits = _unsigned(codes, -1).astype(np.uint16)
    blocks = len(codes)
    parts = []
    for columns, planes, width in ((slice(0, 160), 5, 32), (slice(160, 240), 5, 16)):
        parts.append(_ternary(digits[:, columns].reshape(blocks, planes, width)))
    last = digits[:, 240:].reshape(blocks, 4, 4)
    parts.append(_ternary(np.concatenate([last, np.zeros_like(last[:, :1])], axis=1)))
    return np.hstack([*parts, _half(scales["d"])])


def _ternary(digits: Array) -> Array:
    """Digits [blocks, 5, n] -> bytes [blocks, n]."""
    value = np.zeros_like(digits[:, 0])
    for plane in range(5):
        value = value * 3 + digits[:, plane]
    return ((value * 256 + 242) // 243).astype(np.uint8)


def _crumb_rows(unsigned: Array) -> Array:
    """2-bit codes [blocks, 256] as K-quants store them: two halves of four planes of 32."""
    return _crumbs(unsigned.reshape(-1, 2, 4, 32)).reshape(-1, 64)


def _tq2_0(codes: Array, scales: Fields) -> Array:
    return np.hstack([_crumb_rows(_unsigned(codes, -1)), _half(scales["d"])])


def _q2_k(codes: Array, scales: Fields) -> Array:
    sc, mn = (scales[name].astype(np.uint8) for name in ("sc", "mn"))
    supers = [_half(scales["d"]), _half(scales["dmin"])]
    return np.hstack([sc | mn << 4, _crumb_rows(codes.view(np.uint8)), *supers])


def _q3_k(codes: Array, scales: Fields) -> Array:
    unsigned = _unsigned(codes, -4)
    high = (unsigned >> 2).reshape(-1, 8, 32)
    mask = np.packbits(high, axis=1, bitorder="little").reshape(-1, 32)
    sc = _unsigned(scales["sc"], -32)
    low = sc[:, :8] & 15 | (sc[:, 8:] & 15) << 4
    top = _crumbs((sc >> 4).reshape(-1, 4, 4))
    return np.hstack([mask, _crumb_rows(unsigned & 3), low, top, _half(scales["d"])])


def _six_bit_pairs(scales: Fields) -> Array:
    """Eight sub-scales and sub-offsets of 6 bits in 12 bytes (``get_scale_min_k4``)."""
    sc, mn = (scales[name].astype(np.uint8) for name in ("sc", "mn"))
    first = [part[:, :4] | part[:, 4:] >> 4 << 6 for part in (sc, mn)]
    return np.hstack([*first, sc[:, 4:] & 15 | (mn[:, 4:] & 15) << 4])


def _q4_k(codes: Array, scales: Fields) -> Array:
    supers = [_half(scales["d"]), _half(scales["dmin"])]
    return np.hstack([*supers, _six_bit_pairs(scales), _paired(codes.view(np.uint8))])


def _q5_k(codes: Array, scales: Fields) -> Array:
    unsigned = codes.view(np.uint8)
    fifth = np.packbits((unsigned >> 4).reshape(-1, 8, 32), axis=1, bitorder="little")
    supers = [_half(scales["d"]), _half(scales["dmin"])]
    high = fifth.reshape(-1, 32)
    return np.hstack([*supers, _six_bit_pairs(scales), high, _paired(unsigned & 15)])


def _paired(codes: Array) -> Array:
    """4-bit codes [blocks, 256] -> [blocks, 128]: of each 64, 32 low and 32 high nibbles."""
    pairs = codes.reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def _iq4_xs(codes: Array, scales: Fields) -> Array:
    sc = _unsigned(scales["sc"], -32)
    high = ((sc >> 4).astype(np.uint16) << 2 * np.arange(8, dtype=np.uint16)).sum(1)
    stored_high = high.astype("<u2")[:, None].view(np.uint8)
    low = sc[:, 0::2] & 15 | (sc[:, 1::2] & 15) << 4
    halves = codes.view(np.uint8).reshape(-1, 8, 2, 16)
    quants = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1, 128)
    return np.hstack([_half(scales["d"]), stored_high, low, quants])


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
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
    "Q2_0": _q2_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_0": _q8_0,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    **CODEBOOK_PACKERS,
}


def pack(tensor: QuantizedTensor) -> NDArray[np.uint8]:
    """The rows of a quantized linear as ggml stores them, without the scale of the whole tensor.

    Args:
        tensor: codes int8 [out, in] and the scale fields of its format.

    Returns:
        uint8 [out, row bytes].

    Raises:
        UnsupportedError: No ggml type stores this format, or the width is not whole blocks.
        VerificationError: Codes or scales are not values of the format (a bug in the solver).
    """
    packer, unit = _PACKERS.get(tensor.format.name), tensor.format.tensor_scale
    plain = tensor.format if unit is None else tensor.format.at_tensor_scale(1.0)
    if packer is None or GGML_FORMATS.get(tensor.format.name) != plain:
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

    if unit is not None:  # a power of two
        fields["d"] = fields["d"].astype(np.float64) / unit
    block = tensor.format.stored_block(width)
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
        expected |= {"m": groups} if fmt.sub_offset is None else {"dmin": supers, "mn": groups}
    if fmt.sub_scale is not None:
        expected["sc"] = groups
    shapes = {name: field.shape for name, field in fields.items()}
    if shapes != {name: (rows, count) for name, count in expected.items()}:
        raise VerificationError(
            f"scale fields of {fmt.name} have shapes {shapes}",
            why=f"{rows} rows of {width} weights need {expected} values a row",
        )
    ranges = {"sc": fmt.sub_scale, "mn": fmt.sub_offset}
    for name, field in fields.items():
        limits = ranges.get(name)
        if limits is None:
            _check_stored(name, field, fmt)
        elif not _inside(field, limits, step := fmt.sub_step if name == "sc" else 1):
            low, high = limits
            steps = f" in steps of {step}" if step > 1 else ""
            raise VerificationError(
                f"scale field {name!r} of {fmt.name} is not integers in {low}..{high}{steps}"
            )


def _inside(field: Array, limits: tuple[int, int], step: int) -> bool:
    low, high = limits
    if not np.issubdtype(field.dtype, np.integer):
        return False
    inside = (field >= low) & (field <= high) & ((field.astype(np.int64) - low) % step == 0)
    return bool(inside.all())


def _check_stored(name: str, field: Array, fmt: Format) -> None:
    lattice = fmt.scale_lattice
    finite = np.isfinite(field)
    stored = lattice.round(torch.from_numpy(np.where(finite, field, 0).astype(np.float64))).numpy()
    wrong = ~finite | (stored != field)
    if wrong.any():
        raise VerificationError(
            f"scale field {name!r} of {fmt.name} holds {field[wrong][0]!r}",
            why=f"the file stores {lattice.name}, which cannot represent this value",
        )
