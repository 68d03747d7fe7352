"""A weight matrix as the output file will hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exporters.gguf import pack
from pipeline.quantization.formats import QuantizedTensor, get_format

FLOAT_TYPES = ("F32", "F16")

TENSOR_SCALE = "tensor_scale"
"""Name of a whole tensor's scale among the fields of a matrix in the run directory."""


@dataclass(frozen=True)
class StoredTensor:
    """A quantized matrix, or a float one that is rounded to its storage type.

    Attributes:
        type: ggml type.
        content: Codes and scales, or float32 values that the type represents exactly.
    """

    type: str
    content: QuantizedTensor | Tensor

    @classmethod
    def floating(cls, type_name: str, weight: Tensor) -> StoredTensor:
        """A matrix in F32 or F16. Values beyond the range of F16 become infinite and are refused
        by the writer."""
        return cls(type_name, weight.half().float() if type_name == "F16" else weight.float())

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        content = self.content
        return tuple((content.codes if isinstance(content, QuantizedTensor) else content).shape)

    @property
    def tensor_scale(self) -> float | None:
        """Scale of the whole tensor that the file stores beside the rows, if the type has one."""
        content = self.content
        return content.format.tensor_scale if isinstance(content, QuantizedTensor) else None

    def dequantize(self) -> Tensor:
        """The weights that a runtime computes with, float32 [out, in]."""
        content = self.content
        return content.dequantize() if isinstance(content, QuantizedTensor) else content

    def rows(self) -> np.ndarray:
        """What the writer wants: packed rows, or float32 for float types."""
        content = self.content
        return pack(content) if isinstance(content, QuantizedTensor) else content.numpy()

    def flatten(self, name: str) -> dict[str, Tensor]:
        """Named plain tensors, for the run directory."""
        content = self.content
        if isinstance(content, QuantizedTensor):
            fields = {f"{name}:{key}": value for key, value in content.scales.items()}
            if content.format.tensor_scale is not None:
                fields[f"{name}:{TENSOR_SCALE}"] = torch.tensor([content.format.tensor_scale])
            return {f"{name}:codes": content.codes, **fields}
        return {f"{name}:values": content}

    @classmethod
    def restore(cls, name: str, type_name: str, tensors: Mapping[str, Tensor]) -> StoredTensor:
        """The inverse of `flatten`."""
        own = {
            key.rpartition(":")[2]: value
            for key, value in tensors.items()
            if key.rpartition(":")[0] == name
        }
        if type_name in FLOAT_TYPES:
            return cls(type_name, own["values"])
        codes, fmt = own.pop("codes"), get_format(type_name)
        if fmt.tensor_scale is not None:
            fmt = fmt.at_tensor_scale(float(own.pop(TENSOR_SCALE)))
        return cls(type_name, QuantizedTensor(fmt, codes, own))


def digest(weights: Tensor | np.ndarray) -> str:
    """SHA-256 of float32 weights, little-endian, row-major."""
    array = weights.numpy() if isinstance(weights, torch.Tensor) else weights
    data = np.ascontiguousarray(array, dtype="<f4")
    return hashlib.sha256(data.data).hexdigest()
