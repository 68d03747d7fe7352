"""ONNX files: integer weights, the decoder's graph, writing; and a strict reader.

Names are resolved on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.onnx.entries import WeightEntry
    from exporters.onnx.integers import IntegerWeight, integer_weight, storage_of
    from exporters.onnx.reader import OnnxFile, read_onnx
    from exporters.onnx.size import Rotary
    from exporters.onnx.writer import write_onnx

__all__ = [
    "IntegerWeight",
    "OnnxFile",
    "Rotary",
    "WeightEntry",
    "integer_weight",
    "read_onnx",
    "storage_of",
    "write_onnx",
]

_HOMES = {
    "integers": ("IntegerWeight", "integer_weight", "storage_of"),
    "reader": ("OnnxFile", "read_onnx"),
    "size": ("Rotary",),
    "entries": ("WeightEntry",),
    "writer": ("write_onnx",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
