"""Decoders of ggml block types: file bytes to the float32 weights that llama.cpp computes with.

Written from the block layouts (ggml-common.h) and independent of the packers in `exporters`, so
that a mistake in one does not cancel out in the other. The results are bit-exact: a product of an
fp16 scale, an integer sub-scale and a code fits float32, and affine types round once.

A further type needs one function [blocks, block bytes] -> [blocks, block] and one line in
`DECODERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError, UnsupportedError
from runtimes.ggml_codebooks import iq2_s, iq2_xs, iq2_xxs, iq3_s, iq3_xxs

_CHUNK_WEIGHTS = 1 << 22  # bounds temporaries to a few times 16 MiB


@dataclass(frozen=True)
class Decoder:
    """How to read the blocks of one type.

    Attributes:
        block: Weights in a block.
        nbytes: Bytes of a block.
        decode: uint8 [blocks, nbytes] -> float32 [blocks, block].
        offsets: uint8 [blocks, nbytes] -> float32 [blocks, groups], the ``m`` of ``w = d q + m``;
            None for types without one.
    """

    block: int
    nbytes: int
    decode: Callable[[np.ndarray], np.ndarray]
    offsets: Callable[[np.ndarray], np.ndarray] | None = None


def dequantize(raw: np.ndarray, type_name: str, width: int) -> Tensor:
    """Decode rows of one ggml type.

    Args:
        raw: uint8 [rows, row bytes], as stored.
        type_name: ggml name, ``Q4_0`` style.
        width: Weights in a row.

    Returns:
        float32 [rows, width].

    Raises:
        UnsupportedError: No decoder for this type.
        InputError: `raw` does not hold rows of `width` weights.
    """
    decoder = decoder_of(type_name)
    _check_rows(raw, type_name, width, decoder)
    weights = np.empty((len(raw), width), np.float32)
    step = max(1, _CHUNK_WEIGHTS // width)
    for row in range(0, len(raw), step):
        blocks = raw[row : row + step].reshape(-1, decoder.nbytes)
        weights[row : row + step] = decoder.decode(blocks).reshape(-1, width)
    return torch.from_numpy(weights)


def offsets(raw: np.ndarray, type_name: str, width: int) -> Tensor | None:
    """Offsets ``m`` of affine types (``w = d q + m``), float32 [rows, groups]; None for others.

    Args and Raises: As `dequantize`.
    """
    decoder = decoder_of(type_name)
    _check_rows(raw, type_name, width, decoder)
    if decoder.offsets is None:
        return None
    found = decoder.offsets(raw.reshape(-1, decoder.nbytes))
    return torch.from_numpy(found.reshape(len(raw), -1))


def decoder_of(type_name: str) -> Decoder:
    """The decoder of a ggml type.

    Raises:
        UnsupportedError: There is none.
    """
    decoder = DECODERS.get(type_name)
    if decoder is None:
        raise UnsupportedError(
            f"no decoder for ggml type {type_name}",
            fix=f"use one of {', '.join(DECODERS)}, or run the file in llama.cpp itself",
        )
    return decoder


def _check_rows(raw: np.ndarray, type_name: str, width: int, decoder: Decoder) -> None:
    fits = width > 0 and width % decoder.block == 0
    row_bytes = width // decoder.block * decoder.nbytes
    if raw.dtype != np.uint8 or raw.ndim != 2 or not fits or raw.shape[1] != row_bytes:
        raise InputError(
            f"{raw.dtype} {list(raw.shape)} is not {type_name} with rows of {width}",
            why=f"a block is {decoder.block} weights in {decoder.nbytes} bytes",
        )


def _fp16(pairs: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 2n] -> float32 [blocks, n]."""
    return np.ascontiguousarray(pairs).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibbles are the first half of the block, high nibbles the second: int8 [blocks, 2n]."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.int8)


def _f32(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f4").astype(np.float32, copy=False)


def _bf16(raw: np.ndarray) -> np.ndarray:
    high = np.ascontiguousarray(raw).view("<u2").astype(np.uint32)
    return (high << 16).view(np.float32)


def _q4_0(raw: np.ndarray) -> np.ndarray:
    return _fp16(raw[:, :2]) * (_nibbles(raw[:, 2:]) - np.int8(8))


def _q4_1(raw: np.ndarray) -> np.ndarray:
    return _fp16(raw[:, :2]) * _nibbles(raw[:, 4:]) + _fp16(raw[:, 2:4])


def _q4_1_offsets(raw: np.ndarray) -> np.ndarray:
    return _fp16(raw[:, 2:4])


def _q5_0(raw: np.ndarray) -> np.ndarray:
    fifth = np.unpackbits(raw[:, 2:6], axis=1, bitorder="little").astype(np.int8)
    return _fp16(raw[:, :2]) * (_nibbles(raw[:, 6:]) + fifth * np.int8(16) - np.int8(16))


def _q8_0(raw: np.ndarray) -> np.ndarray:
    return _fp16(raw[:, :2]) * raw[:, 2:].view(np.int8)


def _q2_0(raw: np.ndarray) -> np.ndarray:
    codes = (raw[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    return _fp16(raw[:, :2]) * (codes.reshape(len(raw), 64).astype(np.int8) - np.int8(1))


def _q6_k(raw: np.ndarray) -> np.ndarray:
    """Two halves of 128; in a half, quarter k takes a nibble of `low` and bits 2k of `high`."""
    low = raw[:, :128].reshape(-1, 2, 2, 32)
    high = raw[:, 128:192].reshape(-1, 2, 1, 32)
    four = np.concatenate([low & 15, low >> 4], axis=2)
    two = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (four | two << 4).astype(np.int8) - np.int8(32)
    scales = _fp16(raw[:, 208:]) * raw[:, 192:208].view(np.int8)
    return (codes.reshape(-1, 16, 16) * scales[:, :, None]).reshape(-1, 256)


_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _q5_1(raw: np.ndarray) -> np.ndarray:
    fifth = np.unpackbits(raw[:, 4:8], axis=1, bitorder="little").astype(np.int8)
    codes = _nibbles(raw[:, 8:]) + fifth * np.int8(16)
    return _fp16(raw[:, :2]) * codes + _fp16(raw[:, 2:4])


def _iq4_nl(raw: np.ndarray) -> np.ndarray:
    return _fp16(raw[:, :2]) * _IQ4[_nibbles(raw[:, 2:])]


def _iq4_xs(raw: np.ndarray) -> np.ndarray:
    """Eight groups of 32, each with 6 bits of scale: 4 of them in nibbles, 2 in a 16-bit word."""
    word = np.ascontiguousarray(raw[:, 2:4]).view("<u2")
    high = word >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scales = _fp16(raw[:, :2]) * ((low | high << 4).astype(np.int8) - np.int8(32))
    packed = raw[:, 8:].reshape(-1, 8, 16)
    levels = _IQ4[np.concatenate([packed & 15, packed >> 4], axis=2)]
    return (scales[:, :, None] * levels).reshape(-1, 256)


def _mxfp4(raw: np.ndarray) -> np.ndarray:
    scale = np.ldexp(np.float32(1), raw[:, :1].astype(np.int32) - 128).astype(np.float32)
    with np.errstate(over="ignore"):  # infinite in llama.cpp too
        return scale * _FP4[_nibbles(raw[:, 1:])]


def _nvfp4(raw: np.ndarray) -> np.ndarray:
    """Four scales in E4M3 for 16 weights each, halved; 0x7F, which is no number, counts as 0."""
    power, fraction = (raw[:, :4] >> 3 & 15).astype(np.int32), (raw[:, :4] & 7).astype(np.float32)
    normal = np.ldexp(1 + fraction / 8, power - 7)
    scales = np.where(power == 0, fraction / 512, normal).astype(np.float32) / 2
    scales[raw[:, :4] == 0x7F] = 0
    packed = raw[:, 4:].reshape(-1, 4, 8)
    levels = _FP4[np.concatenate([packed & 15, packed >> 4], axis=2)]
    return (scales[:, :, None] * levels).reshape(-1, 64)


def _planes(packed: np.ndarray) -> np.ndarray:
    """2-bit codes of K-quants: in each half of 128, byte j holds elements j, 32+j, 64+j, 96+j."""
    halves = packed.reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (halves >> shifts & 3).astype(np.int8).reshape(-1, 256)


def _tq1_0(raw: np.ndarray) -> np.ndarray:
    """A byte is a fraction of 256 in base 3: its digits come out by multiplying, top first."""
    digits = []
    for part, count in ((raw[:, :32], 5), (raw[:, 32:48], 5), (raw[:, 48:52], 4)):
        for n in range(count):
            turned = (part.astype(np.uint16) * 3**n & 255) * 3 >> 8
            digits.append(turned.astype(np.int8) - np.int8(1))
    return _fp16(raw[:, 52:]) * np.concatenate(digits, axis=1)


def _tq2_0(raw: np.ndarray) -> np.ndarray:
    return _fp16(raw[:, 64:]) * (_planes(raw[:, :64]) - np.int8(1))


def _grouped(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
    """``scale * code - offset`` with one of each for every group of a block of 256."""
    values = scales[:, :, None] * codes.reshape(len(codes), scales.shape[1], -1)
    if offsets is not None:
        values = values - offsets[:, :, None]
    return values.reshape(-1, 256)


def _q2_k(raw: np.ndarray) -> np.ndarray:
    scales = _fp16(raw[:, 80:82]) * (raw[:, :16] & 15)
    return _grouped(_planes(raw[:, 16:80]), scales, _fp16(raw[:, 82:84]) * (raw[:, :16] >> 4))


def _q3_k(raw: np.ndarray) -> np.ndarray:
    """The third bit of element 32k + l is bit k of byte l; 6-bit scales lie in 12 bytes."""
    third = np.unpackbits(raw[:, None, :32], axis=1, bitorder="little").reshape(-1, 256)
    codes = _planes(raw[:, 32:96]) + third.astype(np.int8) * np.int8(4) - np.int8(4)
    low = np.concatenate([raw[:, 96:104] & 15, raw[:, 96:104] >> 4], axis=1)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (raw[:, None, 104:108] >> shifts & 3).reshape(-1, 16)
    six = (low | high << 4).astype(np.int8) - np.int8(32)
    return _grouped(codes, _fp16(raw[:, 108:]) * six, None)


def _k4_pairs(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets, float32 [blocks, 8], of the header that Q4_K and Q5_K share."""
    packed = raw[:, 4:16]
    sc, mn = packed[:, :4], packed[:, 4:8]
    last = packed[:, 8:]
    scales = np.concatenate([sc & 63, last & 15 | sc >> 6 << 4], axis=1)
    offsets = np.concatenate([mn & 63, last >> 4 | mn >> 6 << 4], axis=1)
    return _fp16(raw[:, :2]) * scales, _fp16(raw[:, 2:4]) * offsets


def _q4_k(raw: np.ndarray) -> np.ndarray:
    packed = raw[:, 16:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 256)
    return _grouped(codes, *_k4_pairs(raw))


def _q5_k(raw: np.ndarray) -> np.ndarray:
    packed = raw[:, 48:].reshape(-1, 4, 1, 32)
    four = np.concatenate([packed & 15, packed >> 4], axis=2).reshape(-1, 256)
    fifth = np.unpackbits(raw[:, None, 16:48], axis=1, bitorder="little").reshape(-1, 256)
    return _grouped(four + fifth * np.uint8(16), *_k4_pairs(raw))


DECODERS: dict[str, Decoder] = {
    "F32": Decoder(1, 4, _f32),
    "F16": Decoder(1, 2, _fp16),
    "BF16": Decoder(1, 2, _bf16),
    "Q4_0": Decoder(32, 18, _q4_0),
    "Q4_1": Decoder(32, 20, _q4_1, _q4_1_offsets),
    "Q5_0": Decoder(32, 22, _q5_0),
    "Q8_0": Decoder(32, 34, _q8_0),
    "Q2_0": Decoder(64, 18, _q2_0),
    "Q6_K": Decoder(256, 210, _q6_k),
    "Q5_1": Decoder(32, 24, _q5_1, _q4_1_offsets),
    "IQ4_NL": Decoder(32, 18, _iq4_nl),
    "IQ4_XS": Decoder(256, 136, _iq4_xs),
    "MXFP4": Decoder(32, 17, _mxfp4),
    "NVFP4": Decoder(64, 36, _nvfp4),
    "TQ1_0": Decoder(256, 54, _tq1_0),
    "TQ2_0": Decoder(256, 66, _tq2_0),
    "Q2_K": Decoder(256, 84, _q2_k),
    "Q3_K": Decoder(256, 110, _q3_k),
    "Q4_K": Decoder(256, 144, _q4_k),
    "Q5_K": Decoder(256, 176, _q5_k),
    "IQ2_XXS": Decoder(256, 66, iq2_xxs),
    "IQ2_XS": Decoder(256, 74, iq2_xs),
    "IQ2_S": Decoder(256, 82, iq2_s),
    "IQ3_XXS": Decoder(256, 98, iq3_xxs),
    "IQ3_S": Decoder(256, 110, iq3_s),
}
