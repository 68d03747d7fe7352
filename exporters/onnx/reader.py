"""Reads back what the writer put into an ONNX file: metadata, codes and scales, floats.

Weights are decoded by the library `onnx`; the writer packs them with `onnx_ir`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import external_data_helper, numpy_helper

from exporters.onnx import planes
from exporters.onnx.integers import IntegerWeight, quantized_tensor, storage_of
from exporters.onnx.names import DATA, EMBEDDING, HIGH, LOW, QUANTIZED, SCALE, TYPES, ZERO
from exporters.onnx.weights import FLOATS, INTEGERS, UNSIGNED
from pipeline.errors import InputError, PipelineError
from pipeline.quantization.formats import QuantizedTensor, get_format


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
        codes, scales = self._codes(name, kind), self._array(name + SCALE)
        if name != EMBEDDING:  # the only one that lies as rows
            codes, scales = codes.T, scales.T
        try:
            fmt = get_format(kind)
            storage = storage_of(fmt, codes.shape, name)
            wanted = (UNSIGNED if storage.unsigned else INTEGERS)[storage.bits][1]
            if codes.dtype != wanted or scales.dtype != np.float16:
                raise InputError(f"{name} is {codes.dtype} with {scales.dtype} scales")
            zeros = None
            if storage.unsigned:
                stored = self._array(name + ZERO)
                if stored.dtype != wanted:
                    raise InputError(f"{name} has {stored.dtype} zero points")
                zeros = np.ascontiguousarray(stored.T.astype(np.int8))
            integers = np.ascontiguousarray(codes.astype(np.int8))
            held = scales.astype(np.float16)
            weight = IntegerWeight(storage.bits, storage.group, integers, held, zeros)
            return quantized_tensor(weight, fmt, name)
        except PipelineError as error:
            raise InputError(
                f"{self.path}: {name} is not the {kind} announced", why=str(error)
            ) from error

    def _codes(self, name: str, kind: str) -> NDArray[np.generic]:
        """Stored integers, from planes in their container."""
        if name + LOW not in self._tensors:
            return self._array(name + QUANTIZED)
        low, high = self._array(name + LOW), self._array(name + HIGH)
        codes = planes.join(low.astype(np.uint8, copy=False), high.astype(np.uint8, copy=False))
        if kind.startswith("U"):
            return codes.astype(UNSIGNED[4][1])
        return (codes - np.int8(planes.OFFSET)).astype(INTEGERS[4][1])

    def floats(self, name: str) -> NDArray[np.float32]:
        """A tensor that is not quantized, float32 in the shape of the checkpoint.

        Raises:
            InputError: No such tensor of floats, or the file is damaged.
        """
        if self.types.get(name) not in FLOATS:
            raise InputError(f"{self.path}: there are no floats {name}")
        values = self._array(name).astype(np.float32)
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
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
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
    except ValueError:
        types = None
    if not isinstance(types, dict) or not all(isinstance(kind, str) for kind in types.values()):
        raise InputError(f"{path} has no {TYPES}", why="it was not written by this exporter")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    return OnnxFile(path, metadata, types, tensors)
