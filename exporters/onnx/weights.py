"""Weights of a checkpoint as initializers and the nodes that dequantize them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx import lookup, planes
from exporters.onnx.entries import (
    FLOATS,
    Contents,
    WeightEntry,
    code_type,
    quantized,
    scale_type,
)
from exporters.onnx.graph_builder import OPERATORS_OF_RUNTIME, GraphBuilder
from exporters.onnx.integers import Storage
from exporters.onnx.names import EMBEDDING, HEAD, HIGH, LOW, QUANTIZED, SCALE, ZERO
from exporters.onnx.packed import pack_rows
from exporters.onnx.table import Table
from pipeline.errors import InputError, UnsupportedError

EXACT_LEVEL = 1
"""Accuracy level of float32 activations."""


class Weights:
    """Makes graph values of weights by their Hugging Face names.

    Args:
        build: Graph under construction.
        entries: All tensors of the model.
    """

    def __init__(self, build: GraphBuilder, entries: Iterable[WeightEntry]) -> None:
        self._build = build
        self._entries = {entry.name: entry for entry in entries}
        self._contents = Contents()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def vector(self, name: str) -> ir.Value:
        """A norm or bias in float32.

        Raises:
            UnsupportedError: Its entry asks for another type.
        """
        entry = self._entry(name)
        if entry.type != "F32":
            raise UnsupportedError(
                f"{name} in {entry.type}", why="norms and biases are float32 in the graph"
            )
        return self._build.initializer(
            name, ir.DataType.FLOAT, entry.shape, lambda: self._contents.floats(entry)
        )

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """``x @ W.T`` and the bias, if the checkpoint has one.

        A quantized weight lies as [in, out] and goes through one DequantizeLinear along its first
        axis with a constant float32 scale into one MatMul: the form that ONNX Runtime fuses into
        MatMulNBits. The scale is a Cast of fp16, which is computed as the file is loaded. E4M3 has
        the same form and is not fused: ONNX Runtime expands it in every call.
        """
        module = name.removesuffix(".weight")
        storage = self._entry(name).storage
        if storage is not None and storage.float_zeros:
            y = self._packed_product(x, name, storage)
        else:
            y = self._build.op("MatMul", x, self._matrix(name), name=module)
        bias = f"{module}.bias"
        return self._build.op("Add", y, self.vector(bias), name=module) if bias in self else y

    def embed(self, ids: ir.Value) -> ir.Value:
        """Rows of the embedding, float32 [batch, sequence, hidden], see `exporters.onnx.table`."""
        return self._table.embed(ids)

    @cached_property
    def _table(self) -> Table:
        return Table(self._build, self._entry(EMBEDDING), self._contents)

    def _matrix(self, name: str) -> ir.Value:
        """W.T in float32, [in, out]."""
        if name == EMBEDDING:
            return self._table.columns()
        entry = self._entry(name)
        codes, *scales = self._initializers(entry)
        if not scales:
            return codes if entry.type == "F32" else self._cast(codes, name)
        storage, word = quantized(entry), f"{name}{SCALE}"
        if storage.number == "e2m1":
            codes = lookup.doubled_e2m1(self._build, codes, np.int8, name)
        powers = storage.exponents
        scale = (
            lookup.powers(self._build, scales[0], word) if powers else self._cast(scales[0], word)
        )
        inputs, group = (codes, scale, *scales[1:]), storage.group
        return self._build.op("DequantizeLinear", *inputs, name=name, axis=0, block_size=group)

    def _packed_product(self, x: ir.Value, name: str, storage: Storage) -> ir.Value:
        """``x @ W.T`` as a MatMulNBits with float zero points, exact in both modes."""
        entry, table = self._entry(name), name == EMBEDDING
        outputs, inputs = entry.shape
        product = self._build.op_multi(
            "MatMulNBits",
            x,
            *(self._table.packed() if table else self._blobs(entry, storage)),
            name=(HEAD if table else name).removesuffix(".weight"),
            outputs=1,
            domain=OPERATORS_OF_RUNTIME,
            K=inputs,
            N=outputs,
            bits=storage.bits,
            block_size=storage.group,
            accuracy_level=EXACT_LEVEL,
        )
        return product[0]

    def _blobs(self, entry: WeightEntry, storage: Storage) -> list[ir.Value]:
        """Codes [out, groups, bytes], scales and zero points [out, groups]."""
        (rows, width), contents = entry.shape, self._contents
        groups, nbytes = width // storage.group, storage.group * storage.bits // 8

        def codes() -> np.ndarray:
            packed = pack_rows(contents.patterns(entry), storage.bits)
            return packed.reshape(rows, groups, nbytes)

        def half(suffix: str, read: Callable[[], np.ndarray]) -> ir.Value:
            word = entry.name + suffix
            value = self._build.initializer(word, FLOATS["F16"], (rows, groups), read)
            return self._cast(value, word)

        shape, kind = (rows, groups, nbytes), ir.DataType.UINT8
        return [
            self._build.initializer(entry.name + QUANTIZED, kind, shape, codes),
            half(SCALE, lambda: contents.integers(entry).scales),
            half(ZERO, lambda: contents.zeros(entry)),
        ]

    def _cast(self, value: ir.Value, name: str) -> ir.Value:
        return self._build.op("Cast", value, name=name, to=ir.DataType.FLOAT)

    def _initializers(self, entry: WeightEntry) -> tuple[ir.Value, ...]:
        """Codes, scales and zero points, or the one float tensor, each [.., out]."""

        def make(
            suffix: str, dtype: ir.DataType, width: int, read: Callable[[], np.ndarray]
        ) -> ir.Value:
            shape = (width, entry.shape[0])
            return self._build.initializer(entry.name + suffix, dtype, shape, lambda: read().T)

        storage, width = entry.storage, entry.shape[1]
        if storage is None:
            numpy = np.float16 if entry.type == "F16" else np.float32
            return (
                make("", FLOATS[entry.type], width, lambda: self._contents.floats(entry, numpy)),
            )
        dtype, numpy_type = code_type(storage)
        groups, contents = width // storage.group, self._contents

        def patterns() -> np.ndarray:
            found = contents.patterns(entry)
            return found.view(numpy_type) if storage.number == "e4m3" else found.astype(numpy_type)

        codes = self._joined(entry) if entry.in_planes else make(QUANTIZED, dtype, width, patterns)
        scales = make(SCALE, scale_type(storage), groups, lambda: contents.integers(entry).scales)
        if not storage.unsigned:
            return codes, scales
        zeros = make(ZERO, dtype, groups, lambda: contents.zeros(entry).astype(numpy_type))
        return codes, scales, zeros

    def _joined(self, entry: WeightEntry) -> ir.Value:
        """Codes [in, out] from two planes."""
        rows, width = entry.shape
        signed = not quantized(entry).unsigned
        offset = planes.OFFSET if signed else 0

        def plane(n: int) -> NDArray[np.uint8]:
            return planes.split((self._contents.integers(entry).codes + np.int8(offset)).T)[n]

        low, high = (
            self._build.initializer(
                entry.name + suffix,
                ir.DataType.UINT8,
                (width // each, rows),
                lambda n=n: plane(n),  # type: ignore[misc]
            )
            for n, (suffix, each) in enumerate(((LOW, 4), (HIGH, 8)))
        )
        shape = (width, rows)
        return planes.joined(self._build, low, high, shape, entry.name, signed=signed)

    def _entry(self, name: str) -> WeightEntry:
        if name not in self._entries:
            raise InputError(f"tensor {name} is missing")
        return self._entries[name]
