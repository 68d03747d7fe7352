"""3-bit codes as a plane of 2 bits and a plane of 1 bit, which ONNX Runtime joins as it loads.

ONNX has no 3-bit integers. A container of 4 bits wastes a quarter of the file; these planes do not,
and the nodes that join them are folded into a 4-bit weight before it is fused, so that speed and
memory are those of the container.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx.graph_builder import GraphBuilder
from pipeline.errors import InputError

LEVELS, WIDTH, LOW_BITS = 8, 3, 2
"""Levels and bits of the codes, and how many bits lie in the first plane."""

OFFSET = 4
"""What is added to signed codes, so that they start at 0."""

Planes = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def split(codes: NDArray[np.int8]) -> Planes:
    """The planes of codes 0 .. 7.

    Args:
        codes: [in, out]; 8 must divide the inputs.

    Returns:
        Lower two bits, uint8 [in / 4, out], and highest bits, uint8 [in / 8, out]; earlier inputs
        in lower bits.
    """
    unsigned = codes.astype(np.uint8)
    low: NDArray[np.uint8] = unsigned & np.uint8(3)
    high: NDArray[np.uint8] = unsigned >> np.uint8(2)
    return _packed(low, 2), _packed(high, 1)


def join(low: NDArray[np.uint8], high: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The inverse of `split`.

    Raises:
        InputError: The planes do not belong together.
    """
    if low.dtype != np.uint8 or high.dtype != np.uint8 or len(low) != 2 * len(high):
        raise InputError(f"planes of {low.dtype} {low.shape} and {high.dtype} {high.shape}")
    return (_spread(low, 2) | _spread(high, 1) << 2).astype(np.int8)


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    each = 8 // bits
    parts = values.reshape(len(values) // each, each, -1) << (bits * np.arange(each))[None, :, None]
    return np.bitwise_or.reduce(parts.astype(np.uint8), axis=1)


def _spread(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    each = 8 // bits
    parts = packed[:, None] >> (bits * np.arange(each, dtype=np.uint8))[None, :, None]
    return (parts & (2**bits - 1)).reshape(len(packed) * each, -1)


def joined(
    build: GraphBuilder,
    low: ir.Value,
    high: ir.Value,
    shape: tuple[int, int],
    name: str,
    *,
    signed: bool,
) -> ir.Value:
    """Nodes that do what `join` does: INT4 or UINT4 [in, out].

    Args:
        build: Graph under construction.
        low: Plane of 2 bits.
        high: Plane of 1 bit.
        shape: [in, out].
        name: Of the nodes.
        signed: Take `OFFSET` away again.
    """

    def spread(plane: ir.Value, bits: int) -> ir.Value:
        word = f"{name}.{bits}_bit"
        each = 8 // bits
        shifts = build.constant((bits * np.arange(each)).reshape(1, each, 1).tolist(), np.uint8)
        rows = build.op("Unsqueeze", plane, build.constant([1], np.int64), name=word)
        rows = build.op("BitShift", rows, shifts, name=word, direction="RIGHT")
        rows = build.op("BitwiseAnd", rows, build.constant(2**bits - 1, np.uint8), name=word)
        return build.op("Reshape", rows, build.constant(list(shape), np.int64), name=word)

    top = build.op(
        "BitShift", spread(high, 1), build.constant(2, np.uint8), name=name, direction="LEFT"
    )
    codes = build.op("BitwiseOr", spread(low, 2), top, name=name)
    if not signed:
        return build.op("Cast", codes, name=f"{name}.codes", to=ir.DataType.UINT4)
    codes = build.op("Cast", codes, name=f"{name}.bytes", to=ir.DataType.INT8)
    codes = build.op("Sub", codes, build.constant(OFFSET, np.int8), name=name)
    return build.op("Cast", codes, name=f"{name}.codes", to=ir.DataType.INT4)
