"""Reads back what the writer put into an ONNX file: metadata, codes and scales, floats.

Weights are decoded by the library `onnx`; the writer packs them with `onnx_ir`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import external_data_helper, numpy_helper

from exporters.onnx import planes
from exporters.onnx.entries import FLOATS, INTEGERS, code_type
from exporters.onnx.integers import (
    IntegerWeight,
    Storage,
    Zeros,
    places,
    quantized_tensor,
    storage_of,
)
from exporters.onnx.names import DATA, EMBEDDING, HIGH, LOW, QUANTIZED, SCALE, TYPES, ZERO
from exporters.onnx.packed import sign_extended, unpack_rows
from pipeline.errors import InputError, PipelineError
from pipeline.quantization.formats import E8M0, QuantizedTensor, get_format

Codes = NDArray[np.int8]


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file of ours; tensors are read when they are asked for.

    Attributes:
        path: Of the graph; the weights lie beside it.
        metadata: All text entries.
        types: Format, F16 or F32 by Hugging Face name of a tensor.
    """

    path: Path
    metadata: dict[str, str]
    types: dict[str, str]
    _tensors: dict[str, onnx.TensorProto] = field(repr=False)

    def quantized(self, name: str) -> QuantizedTensor:
        """Codes and scales of a matrix, exactly as the solver had them.

        Raises:
            InputError: No such quantized tensor, or the file is damaged.
        """
        kind = self.types.get(name, "F32")
        if kind in FLOATS:
            raise InputError(f"{self.path}: {name} is not quantized")
        try:
            fmt = get_format(kind)
            wanted = np.uint8 if fmt.scale_lattice is E8M0 else np.float16
            scales = self._array_of(name + SCALE, wanted)
            if scales.ndim != 2 or 0 in scales.shape:
                raise InputError(f"{name} has scales of shape {scales.shape}")
            blobs = fmt.zero_lattice is not None
            rows = blobs or name == EMBEDDING  # all others lie turned
            held: Any = np.ascontiguousarray(scales if rows else scales.T)
            width = held.shape[-1] * fmt.group_size
            read = self._blobs if blobs else self._rows if rows else self._columns
            storage = storage_of(fmt, (len(held), width), name)
            codes, zeros = read(name, storage, held.shape[-1])
            if storage.number != "integer":
                codes = places(codes.astype(np.uint8), storage.bits)
            codes = np.ascontiguousarray(codes)
            weight = IntegerWeight(storage.bits, storage.group, codes, held, zeros, storage.number)
            return quantized_tensor(weight, fmt, name)
        except (PipelineError, ValueError, TypeError, IndexError) as error:
            raise InputError(
                f"{self.path}: {name} is not the {kind} announced", why=str(error)
            ) from error

    def _blobs(self, name: str, storage: Storage, groups: int) -> tuple[Codes, Zeros | None]:
        """Codes and float zero points of a MatMulNBits, or of an embedding."""
        packed = self._bytes(name + QUANTIZED)
        codes = unpack_rows(packed.reshape(len(packed), -1), storage.bits, groups * storage.group)
        return codes, self._array_of(name + ZERO, np.float16).astype(np.float16)

    def _columns(self, name: str, storage: Storage, _: int) -> tuple[Codes, Zeros | None]:
        """Codes and zero points that lie as [in, out]."""
        wanted = code_type(storage)[1]
        if name + LOW in self._tensors:
            codes = planes.join(self._bytes(name + LOW), self._bytes(name + HIGH))
            codes = codes if storage.unsigned else codes - np.int8(planes.OFFSET)
        else:
            stored = self._array_of(name + QUANTIZED, wanted)
            codes = stored.view(np.int8) if storage.number == "e4m3" else stored.astype(np.int8)
        if not storage.unsigned:
            return codes.T, None
        return codes.T, np.ascontiguousarray(self._array_of(name + ZERO, wanted).T.astype(np.int8))

    def _rows(self, name: str, storage: Storage, groups: int) -> tuple[Codes, Zeros | None]:
        """Codes and zero points of an embedding, packed in bytes below 8 bits."""
        count, bits = groups * storage.group, storage.bits
        if bits == 8:
            return self._array_of(name + QUANTIZED, INTEGERS[8][1]).astype(np.int8), None
        if name + LOW in self._tensors:
            bits = planes.WIDTH
            codes = unpack_rows(self._bytes(name + LOW), planes.LOW_BITS, count)
            high = unpack_rows(self._bytes(name + HIGH), bits - planes.LOW_BITS, count)
            codes = codes | high << np.int8(planes.LOW_BITS)
        else:
            codes = unpack_rows(self._bytes(name + QUANTIZED), bits, count)
        if storage.number != "integer":
            return codes, None
        if not storage.unsigned:
            return sign_extended(codes, bits), None
        return codes, unpack_rows(self._bytes(name + ZERO), storage.bits, groups)

    def _bytes(self, name: str) -> NDArray[np.uint8]:
        return self._array_of(name, np.uint8).astype(np.uint8, copy=False)

    def _array_of(self, name: str, wanted: Any) -> NDArray[np.generic]:
        found = self._array(name)
        if found.dtype != wanted:
            raise InputError(f"{self.path}: {name} is {found.dtype}")
        return found

    def floats(self, name: str) -> NDArray[np.float32]:
        """A tensor that is not quantized, float32 in the shape of the checkpoint.

        Raises:
            InputError: No such tensor of floats, or the file is damaged.
        """
        if self.types.get(name) not in FLOATS:
            raise InputError(f"{self.path}: there are no floats {name}")
        wanted = np.float16 if self.types[name] == "F16" else np.float32
        values = self._array_of(name, wanted).astype(np.float32)
        turned = values.ndim == 2 and name != EMBEDDING
        return np.ascontiguousarray(values.T if turned else values)

    def _array(self, name: str) -> NDArray[np.generic]:
        if name not in self._tensors:
            raise InputError(f"{self.path}: tensor {name} is missing")
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._tensors[name])
        try:
            if external_data_helper.uses_external_data(tensor):
                where = external_data_helper.ExternalDataInfo(tensor).location
                if where != DATA:
                    raise InputError(f"{self.path}: {name} lies in {where!r}, not in {DATA}")
                external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
            return numpy_helper.to_array(tensor)
        except (OSError, ValueError, TypeError, KeyError, onnx.checker.ValidationError) as error:
            raise InputError(
                f"{self.path}: tensor {name} cannot be read", why=str(error)
            ) from error


def read_onnx(path: Path) -> OnnxFile:
    """The graph's metadata and an index of its weights.

    Raises:
        InputError: No such file, not ONNX, or not written by this exporter.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise InputError(f"{path} cannot be read as ONNX", why=str(error)) from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    try:
        types = json.loads(metadata.get(TYPES, ""))
    except (ValueError, RecursionError):
        types = None
    if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
        raise InputError(f"{path} has no {TYPES}", why="it was not written by this exporter")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return OnnxFile(path, metadata, types, tensors)
