"""NVFP4 files with ggml's own quantizer, `ggml_quantize_chunk`: llama-quantize refuses the type."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import numpy as np
import torch

from exporters.gguf import scale_name
from pipeline.quantization.tensor_scale import format_for

TABLES = ("token_embd.weight", "output.weight")
TABLE_TYPE = gguf.GGMLQuantizationType.Q8_0


def quantized(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """float32 [rows, width] as ggml quantizes it, uint8 [rows, row bytes]."""
    from llama_cpp import ctypes_function

    pointer, long = ctypes.c_void_p, ctypes.c_int64
    arguments = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    quantize = ctypes_function("ggml_quantize_chunk", arguments, ctypes.c_size_t)(None)
    values = np.ascontiguousarray(values, np.float32)
    rows = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
    quantize(kind, values.ctypes.data, rows.ctypes.data, 0, *values.shape, None)
    return rows


def write_nvfp4(source: Path, target: Path, *, scaled: bool) -> None:
    """Every matrix of an F32 file in NVFP4 by its covering scales; embedding and head in Q8_0.

    Args:
        source: F32 GGUF file.
        target: File to write.
        scaled: Give every tensor the scale that ours have; otherwise none.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        values = np.array(tensor.data, np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
            continue
        scale, kind = 1.0, TABLE_TYPE
        if tensor.name not in TABLES:
            kind = gguf.GGMLQuantizationType.NVFP4
            if scaled:
                scale = format_for("NVFP4", torch.from_numpy(values)).tensor_scale or 1.0
        rows = quantized(values / np.float32(scale), kind)
        writer.add_tensor(tensor.name, rows, raw_dtype=kind)
        if scale != 1.0:
            writer.add_tensor(scale_name(tensor.name), np.array([scale], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
