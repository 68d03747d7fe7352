"""Tensors of a checkpoint as the writer gets them, and their data at the moment of writing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx import planes
from exporters.onnx.integers import IntegerWeight, Storage, Zeros, bit_patterns, storage_of
from exporters.onnx.names import EMBEDDING
from pipeline.errors import InputError, VerificationError
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
"""Likewise, with zero points; and bit patterns of E2M1."""

E4M3 = (ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn)

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
    def product_bits(self) -> int | None:
        """Bits in which ONNX Runtime multiplies by it; None if they are floats."""
        bits = None if self.storage is None else self.storage.product_bits
        return 4 if bits == 2 and self.name == EMBEDDING else bits

    @property
    def in_planes(self) -> bool:
        """Whether there are 3-bit codes to store as planes."""
        quantized = self.type not in FLOATS
        return self.packed and quantized and len(get_format(self.type).levels) == planes.LEVELS


class Contents:
    """Data of entries, checked against what was announced."""

    def __init__(self) -> None:
        self._last: tuple[str, Content] | None = None

    def _read(self, entry: WeightEntry) -> Content:
        """Data of an entry; the last one is kept, as its parts are written one after the other."""
        if self._last is None or self._last[0] != entry.name:
            self._last = None
            self._last = (entry.name, entry.read())
        return self._last[1]

    def floats(self, entry: WeightEntry, dtype: type[np.floating] = np.float32) -> np.ndarray:
        """A tensor that is not quantized, of the entry's shape.

        Raises:
            VerificationError: It is no float32 of that shape.
            InputError: It is not finite in the type.
        """
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

    def integers(self, entry: WeightEntry) -> IntegerWeight:
        """A quantized matrix.

        Raises:
            VerificationError: It is not of the format announced.
        """
        found, storage = self._read(entry), quantized(entry)
        if not isinstance(found, IntegerWeight) or (
            (found.bits, found.group, found.codes.shape)
            != (storage.bits, storage.group, entry.shape)
        ):
            raise VerificationError(f"tensor {entry.name} is not the {entry.type} announced")
        return found

    def patterns(self, entry: WeightEntry) -> NDArray[np.int8] | NDArray[np.uint8]:
        """Its codes, [out, in]: integers, or bit patterns of floating-point numbers."""
        weight = self.integers(entry)
        return (
            weight.codes if weight.number == "integer" else bit_patterns(weight.codes, weight.bits)
        )

    def zeros(self, entry: WeightEntry) -> Zeros:
        """Its zero points, int8 or float16 [out, groups].

        Raises:
            VerificationError: See `integers`; or it has none.
        """
        zeros = self.integers(entry).zeros
        if zeros is None:
            raise VerificationError(f"tensor {entry.name} has no zero points")
        return zeros


def code_type(storage: Storage) -> tuple[ir.DataType, Any]:
    """ONNX type and its NumPy type of codes that lie as [in, out]."""
    if storage.number == "e4m3":
        return E4M3
    unsigned = storage.unsigned or storage.number == "e2m1"
    return (UNSIGNED if unsigned else INTEGERS)[storage.bits]


def scale_type(storage: Storage) -> ir.DataType:
    """ONNX type of stored scales."""
    return ir.DataType.UINT8 if storage.exponents else ir.DataType.FLOAT16


def quantized(entry: WeightEntry) -> Storage:
    """How a matrix that is known to be quantized is held."""
    storage = entry.storage
    if storage is None:
        raise ValueError(f"{entry.name} is not quantized")
    return storage
