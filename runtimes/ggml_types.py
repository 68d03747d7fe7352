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
}
