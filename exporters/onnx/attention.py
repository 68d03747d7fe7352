"""Norms, rotation and attention in three sets of operators.

* ``standard``: RMSNormalization, RotaryEmbedding and Attention of the ONNX standard (opset 23).
* ``primitive``: nothing that opset 21 did not have; for other and older runtimes.
* ``gqa``: ONNX Runtime's GroupQueryAttention, which can share one buffer between the past and the
  present cache. It takes the number of tokens of a row from its attention mask, hence no padding on
  the left, and no batch in which a cache is continued by more than one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph_builder import OPERATORS_OF_RUNTIME, GraphBuilder
from exporters.onnx.size import DecoderSize, Rotary

AttentionKind = Literal["standard", "primitive", "gqa"]

MASKED = float(np.finfo(np.float32).min)
"""Added to masked scores, as transformers does: a row that sees nothing stays finite."""


@dataclass(frozen=True)
class Inputs:
    """What the decoder's blocks share, besides the hidden states.

    Attributes:
        mask: 1 for tokens, 0 for padding, int64 [batch, total sequence].
        positions: int64 [batch, sequence].
        ids: int64 [batch, sequence].
    """

    mask: ir.Value
    positions: ir.Value
    ids: ir.Value


Attended = tuple[ir.Value, ir.Value, ir.Value]
"""Heads' outputs [batch, sequence, heads * head_dim], then keys and values with those of the past,
each [batch, kv heads, total sequence, head_dim]."""


class StandardAttention:
    """Operators of opset 23.

    Args:
        build: Graph under construction.
        size: Of the decoder.
        rotary: Its position embedding.
        inputs: What blocks share; turned into cosines, sines and mask once.
    """

    opset = 23
    runtime_operators = False

    def __init__(
        self, build: GraphBuilder, size: DecoderSize, rotary: Rotary, inputs: Inputs
    ) -> None:
        self._build, self._size = build, size
        self._cosines, self._sines = self._angles(inputs.positions, rotary)
        self._prepare(inputs)

    def _prepare(self, inputs: Inputs) -> None:
        self._bias = self._causal(inputs)

    def rms_norm(self, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
        """``x / sqrt(mean(x^2) + epsilon) * weight`` along the last axis."""
        return self._build.op(
            "RMSNormalization", x, weight, name=name, axis=-1, epsilon=self._size.epsilon
        )

    def rotate(self, x: ir.Value, heads: int, name: str) -> ir.Value:
        """Turn pairs (i, i + head_dim / 2) of each head, [batch, sequence, heads * head_dim].

        Cosines and sines are computed from the positions: a table would cap the context.
        """
        return self._build.op(
            "RotaryEmbedding", x, self._cosines, self._sines, name=name, num_heads=heads
        )

    def attend(
        self, q: ir.Value, k: ir.Value, v: ir.Value, past: tuple[ir.Value, ir.Value], name: str
    ) -> Attended:
        """Causal attention; q, k and v are [batch, sequence, heads * head_dim]."""
        y, keys, values = self._build.op_multi(
            "Attention",
            *(q, k, v, self._bias, *past),
            name=name,
            outputs=3,
            q_num_heads=self._size.heads,
            kv_num_heads=self._size.kv_heads,
            scale=self._size.head_dim**-0.5,
        )
        return y, keys, values

    def _angles(self, positions: ir.Value, rotary: Rotary) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines, each [batch, sequence, head_dim / 2]."""
        build = self._build
        frequencies = np.array(rotary.frequencies, dtype=np.float32)
        table = build.initializer(
            "rotary.frequencies", ir.DataType.FLOAT, frequencies.shape, lambda: frequencies
        )
        p = build.op("Cast", positions, name="rotary", to=ir.DataType.FLOAT)
        p = build.op("Unsqueeze", p, build.constant([-1], np.int64), name="rotary")
        angles = build.op("Mul", p, table, name="rotary.angles")
        found = [build.op(kind, angles, name="rotary") for kind in ("Cos", "Sin")]
        if rotary.magnitude != 1:
            factor = build.constant(rotary.magnitude, np.float32)
            found = [build.op("Mul", x, factor, name=str(x.name)) for x in found]
        return found[0], found[1]

    def _causal(self, inputs: Inputs) -> ir.Value:
        """What is added to scores: 0, or `MASKED`; [batch, 1, sequence, total sequence]."""
        build = self._build
        zero, one = build.constant(0, np.int64), build.constant(1, np.int64)
        total = self._length(inputs.mask, "mask.total")
        past = build.op("Sub", total, self._length(inputs.ids, "mask.new"), name="mask.past")
        columns = build.op("Range", zero, total, one, name="mask.columns")
        rows = build.op("Range", past, total, one, name="mask.rows")
        rows = build.op("Unsqueeze", rows, build.constant([1], np.int64), name="mask.rows")
        causal = build.op("LessOrEqual", columns, rows, name="mask")
        real = build.op("Cast", inputs.mask, name="mask", to=ir.DataType.BOOL)
        real = build.op("Unsqueeze", real, build.constant([1, 2], np.int64), name="mask")
        seen = build.op("And", causal, real, name="mask")
        floats = (build.constant(value, np.float32) for value in (0.0, MASKED))
        return build.op("Where", seen, *floats, name="mask")

    def _length(self, x: ir.Value, name: str) -> ir.Value:
        """Size of the second axis, a scalar."""
        shape = self._build.op("Shape", x, name=name, start=1, end=2)
        return self._build.op("Squeeze", shape, self._build.constant([0], np.int64), name=name)


class GroupQueryAttention(StandardAttention):
    """ONNX Runtime's own attention operator between standard ones."""

    runtime_operators = True

    def _prepare(self, inputs: Inputs) -> None:
        build = self._build
        axis, one = build.constant([1], np.int64), build.constant(1, np.int64)
        count = build.op("ReduceSum", inputs.mask, axis, name="mask", keepdims=0)
        last = build.op("Sub", count, one, name="mask.last")
        total = self._length(inputs.mask, "mask.total")
        self._last, self._total = (
            build.op("Cast", value, name=f"mask.{n}", to=ir.DataType.INT32)
            for n, value in (("last", last), ("total", total))
        )

    def attend(
        self, q: ir.Value, k: ir.Value, v: ir.Value, past: tuple[ir.Value, ir.Value], name: str
    ) -> Attended:
        """Causal attention, without padding on the left."""
        y, keys, values = self._build.op_multi(
            "GroupQueryAttention",
            *(q, k, v, *past, self._last, self._total),
            name=name,
            outputs=3,
            domain=OPERATORS_OF_RUNTIME,
            num_heads=self._size.heads,
            kv_num_heads=self._size.kv_heads,
            scale=self._size.head_dim**-0.5,
        )
        return y, keys, values


class PrimitiveAttention(StandardAttention):
    """Operators of opset 21 only."""

    opset = 21

    def rms_norm(self, x: ir.Value, weight: ir.Value, name: str) -> ir.Value:
        """The mean square and its root, spelled out."""
        build = self._build
        square = build.op("Mul", x, x, name=f"{name}.square")
        mean = build.op("ReduceMean", square, build.constant([-1], np.int64), name=name)
        epsilon = build.constant(self._size.epsilon, np.float32)
        root = build.op("Sqrt", build.op("Add", mean, epsilon, name=name), name=name)
        return build.op("Mul", build.op("Div", x, root, name=name), weight, name=name)

    def rotate(self, x: ir.Value, heads: int, name: str) -> ir.Value:
        """Halves of each head, turned by products with cosines and sines."""
        build, half = self._build, self._size.head_dim // 2
        split = build.constant([0, 0, heads, self._size.head_dim], np.int64)
        joined = build.constant([0, 0, heads * self._size.head_dim], np.int64)
        axis = build.constant([2], np.int64)
        pairs = build.op("Reshape", x, split, name=f"{name}.split")
        sizes = build.constant([half, half], np.int64)
        a, b = build.op_multi("Split", pairs, sizes, name=name, outputs=2, axis=-1)
        cos, sin = (
            build.op("Unsqueeze", value, axis, name=f"{name}.{word}")
            for value, word in ((self._cosines, "cos"), (self._sines, "sin"))
        )

        def times(y: ir.Value, z: ir.Value, word: str) -> ir.Value:
            return build.op("Mul", y, z, name=f"{name}.{word}")

        first = build.op("Sub", times(a, cos, "ac"), times(b, sin, "bs"), name=name)
        second = build.op("Add", times(b, cos, "bc"), times(a, sin, "as"), name=name)
        turned = build.op("Concat", first, second, name=name, axis=-1)
        return build.op("Reshape", turned, joined, name=f"{name}.joined")

    def attend(
        self, q: ir.Value, k: ir.Value, v: ir.Value, past: tuple[ir.Value, ir.Value], name: str
    ) -> Attended:
        """Query heads that share a key head lie along an axis of their own, which broadcasts."""
        build, size = self._build, self._size
        axis = build.constant([2], np.int64)
        shared = size.heads // size.kv_heads
        keys, values = (
            build.op(
                "Concat", before, self._heads(new, f"{name}.{word}"), name=f"{name}.{word}", axis=2
            )
            for before, new, word in ((past[0], k, "keys"), (past[1], v, "values"))
        )
        grouped = build.constant([0, size.kv_heads, shared, -1, size.head_dim], np.int64)
        q = build.op("Reshape", self._heads(q, f"{name}.queries"), grouped, name=f"{name}.queries")
        k, v = (
            build.op("Unsqueeze", x, axis, name=f"{name}.{word}")
            for x, word in ((keys, "keys"), (values, "values"))
        )
        k = build.op("Transpose", k, name=f"{name}.keys.turned", perm=[0, 1, 2, 4, 3])
        scale = build.constant(size.head_dim**-0.5, np.float32)
        scores = build.op("MatMul", q, k, name=f"{name}.scores")
        scores = build.op("Mul", scores, scale, name=f"{name}.scores")
        bias = build.op("Unsqueeze", self._bias, axis, name=f"{name}.bias")
        scores = build.op("Add", scores, bias, name=f"{name}.scores")
        shares = build.op("Softmax", scores, name=name, axis=-1)
        y = build.op("MatMul", shares, v, name=name)
        apart = build.constant([0, size.heads, -1, size.head_dim], np.int64)
        y = build.op("Reshape", y, apart, name=f"{name}.heads")
        y = build.op("Transpose", y, name=name, perm=[0, 2, 1, 3])
        joined = build.constant([0, 0, size.heads * size.head_dim], np.int64)
        return build.op("Reshape", y, joined, name=f"{name}.joined"), keys, values

    def _heads(self, x: ir.Value, name: str) -> ir.Value:
        """[batch, sequence, heads * head_dim] as [batch, heads, sequence, head_dim]."""
        split = self._build.constant([0, 0, -1, self._size.head_dim], np.int64)
        x = self._build.op("Reshape", x, split, name=f"{name}.split")
        return self._build.op("Transpose", x, name=name, perm=[0, 2, 1, 3])


ATTENTIONS: dict[str, Callable[..., StandardAttention]] = {
    "standard": StandardAttention,
    "primitive": PrimitiveAttention,
    "gqa": GroupQueryAttention,
}
