"""ggml's own kernels, called through ctypes in the libraries that llama-cpp-python ships."""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from exporters.gguf.type_sizes import GGML_TYPES

TYPE_ID = {kind.name: kind.type_id for kind in GGML_TYPES.values()}
SIZES = {kind.name: (kind.block, kind.nbytes) for kind in GGML_TYPES.values()}
_NAME = {type_id: name for name, type_id in TYPE_ID.items()}

_TO_FLOAT = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)
_VEC_DOT = ctypes.CFUNCTYPE(
    *(None, c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_size_t, c_int)
)


class _Traits(ctypes.Structure):
    _fields_ = [
        ("type_name", c_char_p),
        ("block", c_int64),
        ("interleave", c_int64),
        ("size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", _TO_FLOAT),
        ("from_float_ref", _TO_FLOAT),
    ]


class _CPUTraits(ctypes.Structure):
    _fields_ = [
        ("from_float", _TO_FLOAT),
        ("vec_dot", _VEC_DOT),
        ("vec_dot_type", c_int),
        ("nrows", c_int64),
    ]


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    folder = Path(pytest.importorskip("llama_cpp").__file__).parent / "lib"
    if not (folder / "libggml-cpu.so").exists():
        pytest.skip("ggml libraries are not where Linux builds of llama-cpp-python keep them")
    base, cpu = ctypes.CDLL(folder / "libggml-base.so"), ctypes.CDLL(folder / "libggml-cpu.so")
    base.ggml_get_type_traits.restype = POINTER(_Traits)
    base.ggml_quantize_chunk.restype = c_size_t
    base.ggml_quantize_chunk.argtypes = [
        *(c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)
    ]
    cpu.ggml_get_type_traits_cpu.restype = POINTER(_CPUTraits)
    cpu.ggml_cpu_init()
    return base, cpu


def quantize(weights: np.ndarray, type_name: str) -> np.ndarray:
    """float32 [rows, width] -> uint8 [rows, row bytes], by ggml_quantize_chunk."""
    rows, width = weights.shape
    even = np.ones(width, np.float32)  # the IQ2 types cannot do without importances
    importances = even.ctypes.data if type_name.startswith("IQ2") else None
    block, nbytes = SIZES[type_name]
    raw = np.zeros((rows, width // block * nbytes), np.uint8)
    source = np.ascontiguousarray(weights, np.float32)
    written = _libraries()[0].ggml_quantize_chunk(
        TYPE_ID[type_name], source.ctypes.data, raw.ctypes.data, 0, rows, width, importances
    )
    assert written == raw.nbytes
    return raw


def to_float(raw: np.ndarray, type_name: str, width: int) -> np.ndarray:
    """uint8 [rows, row bytes] -> float32 [rows, width], by the type's to_float."""
    if type_name == "F32":
        return raw.view(np.float32)
    raw = np.ascontiguousarray(raw)
    weights = np.zeros((len(raw), width), np.float32)
    traits = _libraries()[0].ggml_get_type_traits(TYPE_ID[type_name]).contents
    assert traits.type_name.decode().upper() == type_name
    traits.to_float(raw.ctypes.data, weights.ctypes.data, weights.size)
    return weights


def activation_type(weight_type: str) -> str:
    """Type that the CPU backend rounds the input to."""
    return _NAME[_cpu_traits(weight_type).vec_dot_type]


def round_activations(x: np.ndarray, type_name: str) -> np.ndarray:
    """float32 [rows, width] -> uint8 [rows, row bytes], by the CPU's from_float."""
    rows, width = x.shape
    block, nbytes = SIZES[type_name]
    raw = np.zeros((rows, width // block * nbytes), np.uint8)
    x = np.ascontiguousarray(x, np.float32)
    if type_name == "F32":
        return x.view(np.uint8)
    for source, target in zip(x, raw, strict=True):
        _cpu_traits(type_name).from_float(source.ctypes.data, target.ctypes.data, width)
    return raw


def matmul(x: np.ndarray, raw: np.ndarray, type_name: str) -> np.ndarray:
    """float32 [n, width], uint8 [rows, row bytes] -> float32 [n, rows], by vec_dot."""
    traits = _cpu_traits(type_name)
    inputs = round_activations(x, activation_type(type_name))
    raw = np.ascontiguousarray(raw)
    out = np.zeros((len(x), len(raw)), np.float32)
    for i, j in np.ndindex(out.shape):
        cell = out[i, j : j + 1]
        traits.vec_dot(
            x.shape[1], cell.ctypes.data, 0, raw[j].ctypes.data, 0, inputs[i].ctypes.data, 0, 1
        )
    return out


def _cpu_traits(type_name: str) -> _CPUTraits:
    return _libraries()[1].ggml_get_type_traits_cpu(TYPE_ID[type_name]).contents
