"""NVFP4 files with ggml's own quantizer, for want of llama-quantize's: it does not write the type.

The quantizer is that of the `gguf` package, whose bytes are those of the C library.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from exporters.gguf import scale_name
from pipeline.quantization.tensor_scale import format_for

TABLES = ("token_embd.weight", "output.weight")
TABLE_TYPE = gguf.GGMLQuantizationType.Q8_0


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
        rows = gguf.quants.quantize(values / np.float32(scale), kind)
        writer.add_tensor(tensor.name, rows, raw_dtype=kind)
        if scale != 1.0:
            writer.add_tensor(scale_name(tensor.name), np.array([scale], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
