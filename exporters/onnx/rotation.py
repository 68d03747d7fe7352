"""A rotation of blocks of channels at run time, as a Kronecker product of two small matrices."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph_builder import GraphBuilder
from pipeline.errors import InputError

KroneckerPair = tuple[np.ndarray, np.ndarray]
"""A [a, a] and B [b, b], orthogonal, float32: a block's channels, a matrix X, become ``A X B'``."""

ORTHOGONAL = 1e-5
"""Most that ``A A'`` may differ from the identity."""


class BlockRotation:
    """Rotates the last dimension in blocks of ``a b`` channels: ``2 (a + b)`` operations a channel.

    Args:
        build: Takes the two matrices, once for all uses.
        pair: A and B.
        width: Channels.

    Raises:
        InputError: Blocks do not divide the channels, or a matrix is not orthogonal.
    """

    def __init__(self, build: GraphBuilder, pair: KroneckerPair, width: int) -> None:
        self._build, self._width = build, width
        self._orders = tuple(len(matrix) for matrix in pair)
        block = self._orders[0] * self._orders[1]
        if width % block:
            raise InputError(f"blocks of {block} channels do not divide {width}")
        for matrix in pair:
            unit = np.eye(len(matrix))
            if matrix.shape != unit.shape or np.abs(matrix @ matrix.T - unit).max() > ORTHOGONAL:
                raise InputError("a rotation at run time is not orthogonal")
        # The runtime multiplies by A from the left as it is, by B' from the right.
        self._matrices = [
            self._initializer("left", pair[0]) if self._orders[0] > 1 else None,
            self._initializer("right", np.ascontiguousarray(pair[1].T))
            if self._orders[1] > 1
            else None,
        ]

    def _initializer(self, side: str, matrix: np.ndarray) -> ir.Value:
        name = f"model.inner_rotation.{side}"
        shape = (len(matrix), len(matrix))
        return self._build.initializer(name, ir.DataType.FLOAT, shape, lambda: matrix)

    def __call__(self, value: ir.Value, name: str) -> ir.Value:
        """The rotated value; nodes are called `name`."""
        build, (left, right) = self._build, self._matrices
        first, second = self._orders
        blocks = self._width // (first * second)
        split = build.constant([0, 0, blocks, first, second], np.int64)
        joined = build.constant([0, 0, self._width], np.int64)
        value = build.op("Reshape", value, split, name=f"{name}.split")
        if right is not None:
            value = build.op("MatMul", value, right, name=f"{name}.right")
        if left is not None:
            value = build.op("MatMul", left, value, name=f"{name}.left")
        return build.op("Reshape", value, joined, name=f"{name}.joined")
