"""The quantizers and dequantizers of the installed ggml library, through ctypes."""

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest


class _Traits(ctypes.Structure):
    _fields_ = (  # struct ggml_type_traits of ggml.h
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL:
    """ggml-base, initialised so that it can convert fp16."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama_cpp.llama_backend_init()
    folder = Path(llama_cpp.__file__).parent / "lib"
    names = [f for f in folder.iterdir() if "ggml-base" in f.name]
    found = ctypes.CDLL(str(sorted(names)[0]))
    found.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *(ctypes.c_int64,) * 3,
        ctypes.c_void_p,
    )
    found.ggml_validate_row_data.restype = ctypes.c_bool
    found.ggml_validate_row_data.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    return found


def traits(type_id: int) -> tuple[str, int, int]:
    """Name, block size and block bytes of a type."""
    entry = library().ggml_get_type_traits(type_id).contents
    return entry.type_name.decode(), entry.block_size, entry.type_size


def dequantize(type_id: int, packed: np.ndarray, width: int) -> np.ndarray:
    """Packed rows uint8 [rows, row bytes] -> float32 [rows, width]."""
    packed = np.ascontiguousarray(packed)
    assert library().ggml_validate_row_data(type_id, packed.ctypes.data, packed.nbytes)
    out = np.empty((len(packed), width), np.float32)
    to_float = library().ggml_get_type_traits(type_id).contents.to_float
    to_float(packed.ctypes.data, out.ctypes.data, out.size)
    return out


def quantize(type_id: int, weights: np.ndarray) -> np.ndarray:
    """float32 [rows, width] -> packed rows uint8 [rows, row bytes]."""
    weights = np.ascontiguousarray(weights, np.float32)
    rows, width = weights.shape
    name, block, nbytes = traits(type_id)
    even = np.ones(width, np.float32)  # the IQ2 types cannot do without importances
    importances = even.ctypes.data if name.startswith("iq2") else None
    out = np.empty((rows, width // block * nbytes), np.uint8)
    written = library().ggml_quantize_chunk(
        type_id, weights.ctypes.data, out.ctypes.data, 0, rows, width, importances
    )
    assert written == out.nbytes
    return out
