"""Codes narrower than a byte, packed along rows, and the nodes that unpack them.

ONNX gathers no integers of 2 or 4 bits, and MatMulNBits wants bytes. The order is that of ONNX's
own INT4 and UINT4 tensors and of MatMulNBits: earlier codes in lower bits.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.graph_builder import GraphBuilder
from pipeline.errors import InputError


def pack_rows(codes: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """The lowest bits of each code, a row in whole bytes.

    Args:
        codes: Two's complement or unsigned, [rows, codes].
        bits: 1, 2 or 4 of each.

    Returns:
        uint8 [rows, ceil(codes * bits / 8)]; unused bits are 0.
    """
    each, (rows, count) = 8 // bits, codes.shape
    padded = np.zeros((rows, -(-count // each) * each), np.uint8)
    padded[:, :count] = codes.astype(np.uint8) & np.uint8(2**bits - 1)
    parts = padded.reshape(rows, -1, each) << _shifts(bits)
    found: NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=2)
    return found


def unpack_rows(packed: NDArray[np.generic], bits: int, count: int) -> NDArray[np.int8]:
    """The inverse of `pack_rows` for unsigned codes.

    Args:
        packed: uint8 [rows, bytes].
        bits: Of each code.
        count: Codes of a row.

    Raises:
        InputError: Rows of other bytes.
    """
    if packed.dtype != np.uint8 or packed.shape[1:] != (-(-count * bits // 8),):
        raise InputError(f"{packed.dtype} {packed.shape} cannot hold rows of {count} x {bits} bits")
    parts = packed.astype(np.uint8)[:, :, None] >> _shifts(bits) & np.uint8(2**bits - 1)
    return parts.reshape(len(packed), -1)[:, :count].astype(np.int8)


def sign_extended(codes: NDArray[np.int8], bits: int) -> NDArray[np.int8]:
    """Unsigned bit patterns 0 .. 2^bits-1 read as two's complement, same shape."""
    half = np.int8(1 << (bits - 1))
    return (codes ^ half) - half


def unpacked(
    build: GraphBuilder, packed: ir.Value, bits: int, shape: list[int], name: str
) -> ir.Value:
    """Nodes that do what `unpack_rows` does: uint8.

    Args:
        build: Graph under construction.
        packed: uint8 [..., bytes].
        bits: Of each code.
        shape: Of the result, as Reshape takes it (0 copies a size).
        name: Of the nodes.
    """
    last = build.constant([-1], np.int64)
    codes = build.op("Unsqueeze", packed, last, name=name)
    shifts = build.constant(_shifts(bits).tolist(), np.uint8)
    codes = build.op("BitShift", codes, shifts, name=name, direction="RIGHT")
    codes = build.op("BitwiseAnd", codes, build.constant(2**bits - 1, np.uint8), name=name)
    return build.op("Reshape", codes, build.constant(shape, np.int64), name=name)


def _shifts(bits: int) -> NDArray[np.uint8]:
    return (bits * np.arange(8 // bits)).astype(np.uint8)
