"""The token embedding: rows that are gathered as they are stored, shared with a tied head.

A DequantizeLinear before the Gather would expand the whole table for every token. Rows of whole
bytes (floats, 8 bits) are gathered as they are. ONNX gathers nothing narrower: 2 to 4 bits lie
packed in bytes (`exporters.onnx.packed`), of which the gathered ones alone are unpacked.

E2M1 looks its values up among floats, as do exponents of E8M0.

A tied head unpacks the same bytes once, as ONNX Runtime folds constants, into the 4-bit weight of a
MatMulNBits; 2-bit codes as well, because it cannot fold a Cast to 2 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx import lookup
from exporters.onnx.entries import (
    FLOATS,
    INTEGERS,
    Contents,
    WeightEntry,
    quantized,
    scale_type,
)
from exporters.onnx.graph_builder import GraphBuilder
from exporters.onnx.names import HEAD, HIGH, LOW, QUANTIZED, SCALE, ZERO
from exporters.onnx.packed import pack_rows, unpacked
from exporters.onnx.planes import LOW_BITS, WIDTH
from pipeline.errors import UnsupportedError


def check_table(entry: WeightEntry) -> None:
    """Refuses an embedding whose rows cannot be gathered.

    Raises:
        UnsupportedError: It is E4M3.
    """
    if entry.storage is not None and entry.storage.number == "e4m3":
        raise UnsupportedError(
            f"the token embedding in {entry.type}",
            why="ONNX gathers no FLOAT8 and nothing fuses it into a tied head",
            fix="give it another, as with --token-embedding-type INT4_G32; a tied head shares it",
        )


class StoredRows:
    """Initializers of an embedding, each made once.

    Args:
        build: Graph under construction.
        entry: The embedding.
        contents: Reads its data.
    """

    def __init__(self, build: GraphBuilder, entry: WeightEntry, contents: Contents) -> None:
        self._build, self._entry, self._contents = build, entry, contents

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self._entry.shape[1] // quantized(self._entry).group

    @property
    def width(self) -> int:
        """Bits of a stored code."""
        return WIDTH if self._entry.in_planes else quantized(self._entry).bits

    @cached_property
    def floats(self) -> ir.Value:
        """Rows that are not quantized."""
        entry = self._entry
        numpy = np.float16 if entry.type == "F16" else np.float32
        return self._stored(
            "", FLOATS[entry.type], entry.shape[1], lambda: self._contents.floats(entry, numpy)
        )

    @cached_property
    def codes(self) -> list[tuple[ir.Value, int]]:
        """Initializers of the codes, and the bits of a code that each holds."""
        width, bits = self._entry.shape[1], quantized(self._entry).bits

        def patterns() -> NDArray[np.int8] | NDArray[np.uint8]:
            return self._contents.patterns(self._entry)

        def packed(suffix: str, bits: int, down: int = 0) -> tuple[ir.Value, int]:
            read = lambda: pack_rows(patterns() >> np.int8(down), bits)  # noqa: E731
            return self._stored(suffix, ir.DataType.UINT8, width * bits // 8, read), bits

        if self._entry.in_planes:
            return [packed(LOW, LOW_BITS), packed(HIGH, WIDTH - LOW_BITS, LOW_BITS)]
        if bits == 8:
            return [(self._stored(QUANTIZED, INTEGERS[8][0], width, patterns), 8)]
        return [packed(QUANTIZED, bits)]

    @cached_property
    def scales(self) -> ir.Value:
        """Scales [vocabulary, groups] as they are stored."""
        read = lambda: self._contents.integers(self._entry).scales  # noqa: E731
        return self._stored(SCALE, scale_type(quantized(self._entry)), self.groups, read)

    @cached_property
    def zeros(self) -> ir.Value | None:
        """Zero points, packed in bytes or fp16; None without."""
        storage = quantized(self._entry)
        if not storage.unsigned:
            return None
        if storage.float_zeros:
            halves = lambda: self._contents.zeros(self._entry)  # noqa: E731
            return self._stored(ZERO, ir.DataType.FLOAT16, self.groups, halves)

        def read() -> NDArray[np.uint8]:
            return pack_rows(self._contents.zeros(self._entry).astype(np.int8), storage.bits)

        width = -(-self.groups * storage.bits // 8)
        return self._stored(ZERO, ir.DataType.UINT8, width, read)

    def _stored(
        self, suffix: str, dtype: ir.DataType, width: int, read: Callable[[], np.ndarray]
    ) -> ir.Value:
        shape = (self._entry.shape[0], width)
        return self._build.initializer(self._entry.name + suffix, dtype, shape, read)


class Table:
    """An embedding in the graph.

    Args:
        build: Graph under construction.
        entry: The embedding.
        contents: Reads its data.

    Raises:
        UnsupportedError: See `check_table`.
    """

    def __init__(self, build: GraphBuilder, entry: WeightEntry, contents: Contents) -> None:
        check_table(entry)
        self._build, self._entry = build, entry
        self._stored = StoredRows(build, entry, contents)

    def embed(self, ids: ir.Value) -> ir.Value:
        """Rows of some tokens, float32 [batch, sequence, hidden]."""
        build, entry = self._build, self._entry
        if entry.storage is None:
            rows = build.op("Gather", self._stored.floats, ids, name=f"{entry.name}.rows")
            return rows if entry.type == "F32" else self._float(rows, f"{entry.name}.rows")
        group, name = entry.storage.group, f"{entry.name}.groups"

        def gather(stored: ir.Value, word: str) -> ir.Value:
            return build.op("Gather", stored, ids, name=f"{entry.name}.{word}")

        def of_each_group(values: ir.Value, word: str) -> ir.Value:
            last = build.constant([-1], np.int64)
            return build.op("Unsqueeze", values, last, name=f"{entry.name}.group_{word}")

        if entry.storage.bits == 8:
            split = build.constant([0, 0, self._stored.groups, group], np.int64)
            rows = build.op("Reshape", gather(self._stored.codes[0][0], "rows"), split, name=name)
            rows = self._float(rows, name)
        else:
            parts = [(gather(part, f"rows.{bits}"), bits) for part, bits in self._stored.codes]
            rows = self._unpacked(parts, [0, 0, self._stored.groups, group], f"{entry.name}.rows")
            rows = self._values(rows, name)
        if self._stored.zeros is not None:
            zeros = self._zero_points(gather(self._stored.zeros, "zeros"), [0, 0], "zeros")
            zeros = self._float(zeros, f"{entry.name}.group_zeros")
            rows = build.op("Sub", rows, of_each_group(zeros, "zeros"), name=name)
        scales = self._scale_values(
            gather(self._stored.scales, "scales"), f"{entry.name}.group_scales"
        )
        rows = build.op("Mul", rows, of_each_group(scales, "scales"), name=name)
        joined = build.constant([0, 0, entry.shape[1]], np.int64)
        return build.op("Reshape", rows, joined, name=f"{entry.name}.joined")

    def columns(self) -> ir.Value:
        """The matrix of a tied head, float32 [hidden, vocabulary], of the same initializers."""
        build, entry = self._build, self._entry
        if entry.storage is None:
            turned = self._turned(self._stored.floats, f"{HEAD}.tied")
            return turned if entry.type == "F32" else self._float(turned, HEAD)
        inputs = [
            self._turned(self._whole_codes(), f"{HEAD}.tied"),
            self._scale_values(
                self._turned(self._stored.scales, f"{HEAD}.tied.scales"), f"{HEAD}{SCALE}"
            ),
        ]
        if self._stored.zeros is not None:
            zeros = self._zero_points(self._stored.zeros, [entry.shape[0]], "tied.zeros")
            zeros = build.op("Cast", zeros, name=f"{HEAD}{ZERO}", to=ir.DataType.UINT4)
            inputs.append(self._turned(zeros, f"{HEAD}.tied.zeros"))
        group = entry.storage.group
        return build.op("DequantizeLinear", *inputs, name=HEAD, axis=0, block_size=group)

    def packed(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Codes, scales and float zero points of a tied head, as MatMulNBits takes them."""
        build, entry, storage = self._build, self._entry, quantized(self._entry)
        blobs = [entry.shape[0], self._stored.groups, storage.group * storage.bits // 8]
        shape = build.constant(blobs, np.int64)
        codes = build.op("Reshape", self._stored.codes[0][0], shape, name=f"{HEAD}.tied")
        scales = self._scale_values(self._stored.scales, f"{HEAD}{SCALE}")
        if self._stored.zeros is None:
            raise ValueError(f"{entry.name} has no zero points")
        return codes, scales, self._float(self._stored.zeros, f"{HEAD}{ZERO}")

    def _whole_codes(self) -> ir.Value:
        """All codes as INT8, INT4 or UINT4 [vocabulary, hidden], which are numbers."""
        if quantized(self._entry).bits == 8:
            return self._stored.codes[0][0]
        name = f"{HEAD}.unpacked"
        codes = self._unpacked(self._stored.codes, list(self._entry.shape), name)
        if quantized(self._entry).number == "e2m1":
            return lookup.doubled_e2m1(self._build, codes, np.int8, f"{name}.codes")
        if quantized(self._entry).unsigned:
            return self._build.op("Cast", codes, name=f"{name}.codes", to=ir.DataType.UINT4)
        codes = self._signed(codes, name)
        return self._build.op("Cast", codes, name=f"{name}.codes", to=ir.DataType.INT4)

    def _unpacked(self, parts: list[tuple[ir.Value, int]], shape: list[int], name: str) -> ir.Value:
        """Bit patterns of codes, uint8, from one packed part or from planes."""
        build = self._build
        found = [unpacked(build, part, bits, shape, f"{name}.{bits}") for part, bits in parts]
        if len(found) == 1:
            return found[0]
        up = build.constant(LOW_BITS, np.uint8)
        high = build.op("BitShift", found[1], up, name=f"{name}.high", direction="LEFT")
        return build.op("BitwiseOr", found[0], high, name=name)

    def _values(self, codes: ir.Value, name: str) -> ir.Value:
        """What bit patterns stand for, float32; zero points are not taken off."""
        if quantized(self._entry).number == "e2m1":
            return lookup.doubled_e2m1(self._build, codes, np.float32, name)
        return self._float(self._signed(codes, name), name)

    def _scale_values(self, scales: ir.Value, name: str) -> ir.Value:
        """Scales in float32."""
        if quantized(self._entry).exponents:
            return lookup.powers(self._build, scales, name)
        return self._float(scales, name)

    def _signed(self, codes: ir.Value, name: str) -> ir.Value:
        """Bit patterns as two's complement, int8; unsigned codes as they are."""
        build, entry = self._build, self._entry
        if quantized(entry).unsigned:
            return codes
        half = 1 << (self._stored.width - 1)
        codes = build.op("BitwiseXor", codes, build.constant(half, np.uint8), name=name)
        codes = build.op("Cast", codes, name=f"{name}.signed", to=ir.DataType.INT8)
        return build.op("Sub", codes, build.constant(half, np.int8), name=f"{name}.signed")

    def _zero_points(self, packed: ir.Value, lead: list[int], word: str) -> ir.Value:
        """Unpacked zero points, uint8 [*lead, groups]: the bits that fill a row up are cut off.
        Float ones as they are."""
        if quantized(self._entry).float_zeros:
            return packed
        build, bits = self._build, quantized(self._entry).bits
        each, name = 8 // bits, f"{self._entry.name}.{word}"
        held = -(-self._stored.groups // each) * each
        zeros = unpacked(build, packed, bits, [*lead, held], name)
        if held == self._stored.groups:
            return zeros
        ends = (build.constant([n], np.int64) for n in (0, self._stored.groups, -1))
        return build.op("Slice", zeros, *ends, name=name)

    def _float(self, value: ir.Value, name: str) -> ir.Value:
        return self._build.op("Cast", value, name=name, to=ir.DataType.FLOAT)

    def _turned(self, value: ir.Value, name: str) -> ir.Value:
        return self._build.op("Transpose", value, name=name, perm=[1, 0])
