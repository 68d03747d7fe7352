"""Weights of a checkpoint as initializers and the nodes that dequantize them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx import planes
from exporters.onnx.graph_builder import GraphBuilder
from exporters.onnx.integers import IntegerWeight, Storage, storage_of
from exporters.onnx.names import EMBEDDING, HEAD, HIGH, LOW, QUANTIZED, SCALE, ZERO
from pipeline.errors import InputError, UnsupportedError, VerificationError
from pipeline.quantization.formats import get_format

FLOATS = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16}
INTEGERS = {
    2: (ir.DataType.INT2, ml_dtypes.int2),
    4: (ir.DataType.INT4, ml_dtypes.int4),
    8: (ir.DataType.INT8, np.int8),
}
"""ONNX type and its NumPy type by width."""

UNSIGNED = {
    2: (ir.DataType.UINT2, ml_dtypes.uint2),
    4: (ir.DataType.UINT4, ml_dtypes.uint4),
}
"""Likewise, with zero points."""

Content = IntegerWeight | NDArray[np.float32]


@dataclass(frozen=True)
class WeightEntry:
    """A tensor of the checkpoint to write.

    Attributes:
        name: Hugging Face name.
        type: F32, F16, or the name of a format that `storage_of` takes.
        shape: As in the checkpoint: [n], or [out, in].
        packed: Store 3-bit codes as planes (see `exporters.onnx.planes`) and not in a container of
            4 bits; no matter for other types.
        read: Gives the data: float32 of `shape` for F32 and F16, else an `IntegerWeight`. May be
            called more than once, and only while the file is written.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    read: Callable[[], Content]
    packed: bool = False

    @property
    def storage(self) -> Storage | None:
        """How a quantized matrix is held; None for floats."""
        if self.type in FLOATS:
            return None
        return storage_of(get_format(self.type), self.shape, self.name)

    @property
    def in_planes(self) -> bool:
        """Whether there are 3-bit codes to store as planes."""
        quantized = self.type not in FLOATS
        return self.packed and quantized and len(get_format(self.type).levels) == planes.LEVELS


def check_table(entry: WeightEntry) -> None:
    """Refuses an embedding whose rows cannot be gathered one by one.

    Raises:
        UnsupportedError: Its integers are not whole bytes.
    """
    storage = entry.storage
    if storage is not None and (storage.bits != 8 or storage.unsigned):
        raise UnsupportedError(
            f"the token embedding in {entry.type}",
            why="ONNX gathers rows of whole bytes only, and dequantizing the table first would "
            "cost more than the rest of the model for every token",
            fix="use F16, F32 or INT8_G32 for it",
        )


class Weights:
    """Makes graph values of weights by their Hugging Face names.

    Args:
        build: Graph under construction.
        entries: All tensors of the model.
    """

    def __init__(self, build: GraphBuilder, entries: Iterable[WeightEntry]) -> None:
        self._build = build
        self._entries = {entry.name: entry for entry in entries}
        self._rows: dict[str, tuple[ir.Value, ...]] = {}
        self._last: tuple[str, Content] | None = None

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
            name, ir.DataType.FLOAT, entry.shape, lambda: self._floats(entry)
        )

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """``x @ W.T`` and the bias, if the checkpoint has one.

        A quantized weight lies as [in, out] and goes through one DequantizeLinear along its first
        axis with a constant float32 scale into one MatMul: the form that ONNX Runtime fuses into
        MatMulNBits. The scale is a Cast of fp16, which is computed as the file is loaded.
        """
        module = name.removesuffix(".weight")
        y = self._build.op("MatMul", x, self._matrix(name), name=module)
        bias = f"{module}.bias"
        return self._build.op("Add", y, self.vector(bias), name=module) if bias in self else y

    def embed(self, ids: ir.Value, name: str = EMBEDDING) -> ir.Value:
        """Rows of the embedding, float32 [batch, sequence, hidden].

        Rows are gathered as they are stored and made float32 afterwards: a DequantizeLinear before
        the Gather would expand the whole table for every token.
        """
        build, entry = self._build, self._entry(name)
        check_table(entry)
        codes, *scales = self._table(entry)
        rows = build.op("Gather", codes, ids, name=f"{name}.rows")
        if entry.type != "F32":
            rows = build.op("Cast", rows, name=f"{name}.rows", to=ir.DataType.FLOAT)
        if not scales:
            return rows
        storage = _quantized(entry)
        groups = entry.shape[1] // storage.group
        split = build.constant([0, 0, groups, storage.group], np.int64)
        joined = build.constant([0, 0, entry.shape[1]], np.int64)
        scale = build.op("Gather", scales[0], ids, name=f"{name}.scales")
        scale = build.op("Cast", scale, name=f"{name}.scales", to=ir.DataType.FLOAT)
        axis = build.constant([-1], np.int64)
        scale = build.op("Unsqueeze", scale, axis, name=f"{name}.scales")
        rows = build.op("Reshape", rows, split, name=f"{name}.groups")
        rows = build.op("Mul", rows, scale, name=f"{name}.groups")
        return build.op("Reshape", rows, joined, name=f"{name}.joined")

    def _matrix(self, name: str) -> ir.Value:
        """W.T in float32, [in, out]."""
        entry = self._entry(name)
        table = name == EMBEDDING  # a tied head: the rows are there already
        codes, *scales = self._table(entry) if table else self._columns(entry)
        if table:
            codes = self._turned(codes, f"{HEAD}.tied")
            scales = [self._turned(s, f"{HEAD}.tied.scales") for s in scales]
        module = HEAD if table else name
        if not scales:
            return codes if entry.type == "F32" else self._cast(codes, module)
        scale = self._cast(scales[0], f"{module}{SCALE}")
        group = _quantized(entry).group
        inputs = (codes, scale, *scales[1:])
        return self._build.op("DequantizeLinear", *inputs, name=module, axis=0, block_size=group)

    def _cast(self, value: ir.Value, name: str) -> ir.Value:
        return self._build.op("Cast", value, name=name, to=ir.DataType.FLOAT)

    def _turned(self, value: ir.Value, name: str) -> ir.Value:
        return self._build.op("Transpose", value, name=name, perm=[1, 0])

    def _table(self, entry: WeightEntry) -> tuple[ir.Value, ...]:
        """Initializers of an embedding, as rows; made once, for itself and a tied head."""
        if entry.name not in self._rows:
            self._rows[entry.name] = self._initializers(entry, turned=False)
        return self._rows[entry.name]

    def _columns(self, entry: WeightEntry) -> tuple[ir.Value, ...]:
        return self._initializers(entry, turned=True)

    def _initializers(self, entry: WeightEntry, *, turned: bool) -> tuple[ir.Value, ...]:
        """Codes, scales and zero points, or the one float tensor."""

        def make(
            suffix: str, dtype: ir.DataType, width: int, read: Callable[[], np.ndarray]
        ) -> ir.Value:
            rows = entry.shape[0]
            shape = (width, rows) if turned else (rows, width)
            name = entry.name + suffix
            load = (lambda: read().T) if turned else read
            return self._build.initializer(name, dtype, shape, load)

        storage, width = entry.storage, entry.shape[1]
        if storage is None:
            numpy = np.float16 if entry.type == "F16" else np.float32
            return (make("", FLOATS[entry.type], width, lambda: self._floats(entry, numpy)),)
        dtype, packed = (UNSIGNED if storage.unsigned else INTEGERS)[storage.bits]
        groups = width // storage.group
        if entry.in_planes:
            codes = self._joined(entry)
        else:
            codes = make(
                QUANTIZED, dtype, width, lambda: self._integers(entry).codes.astype(packed)
            )
        scales = make(SCALE, FLOATS["F16"], groups, lambda: self._integers(entry).scales)
        if not storage.unsigned:
            return codes, scales
        return codes, scales, make(ZERO, dtype, groups, lambda: self._zeros(entry).astype(packed))

    def _joined(self, entry: WeightEntry) -> ir.Value:
        """Codes [in, out] from two planes."""
        rows, width = entry.shape
        signed = not _quantized(entry).unsigned
        offset = planes.OFFSET if signed else 0

        def plane(n: int) -> NDArray[np.uint8]:
            return planes.split((self._integers(entry).codes + np.int8(offset)).T)[n]

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

    def _read(self, entry: WeightEntry) -> Content:
        """Data of an entry; the last one is kept, as its parts are written one after the other."""
        if self._last is None or self._last[0] != entry.name:
            self._last = None
            self._last = (entry.name, entry.read())
        return self._last[1]

    def _floats(self, entry: WeightEntry, dtype: type[np.floating] = np.float32) -> np.ndarray:
        found = self._read(entry)
        if (
            isinstance(found, IntegerWeight)
            or found.dtype != np.float32
            or found.shape != entry.shape
        ):
            raise VerificationError(f"tensor {entry.name} is not the float32 that was announced")
        with np.errstate(over="ignore"):
            stored = found.astype(dtype)
        if not np.isfinite(stored).all():
            raise InputError(
                f"tensor {entry.name} holds values that are not finite in {entry.type}",
                why="a damaged checkpoint, or weights beyond the range of the type",
            )
        return stored

    def _integers(self, entry: WeightEntry) -> IntegerWeight:
        found, storage = self._read(entry), _quantized(entry)
        if not isinstance(found, IntegerWeight) or (
            (found.bits, found.group, found.codes.shape)
            != (storage.bits, storage.group, entry.shape)
        ):
            raise VerificationError(f"tensor {entry.name} is not the {entry.type} announced")
        return found

    def _zeros(self, entry: WeightEntry) -> NDArray[np.int8]:
        zeros = self._integers(entry).zeros
        if zeros is None:
            raise VerificationError(f"tensor {entry.name} has no zero points")
        return zeros


def _quantized(entry: WeightEntry) -> Storage:
    storage = entry.storage
    if storage is None:
        raise ValueError(f"{entry.name} is not quantized")
    return storage
