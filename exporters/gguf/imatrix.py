"""Importance matrices in llama.cpp's GGUF format, for llama-quantize and for comparison with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from pipeline.errors import ResourceError


def write_imatrix(
    path: Path, importance: Mapping[str, np.ndarray], *, tokens: int, chunk: int, dataset: str
) -> None:
    """Write mean squared inputs as llama-imatrix would.

    The file holds for every matrix the sums of squares (``NAME.in_sum2``) and the number of tokens
    they are over (``NAME.counts``); llama-quantize divides one by the other.

    Args:
        path: File to write.
        importance: Mean square of each input channel, float32 [in], by GGUF tensor name.
        tokens: Tokens that the means are over.
        chunk: Tokens in a window of text.
        dataset: Name of the text.

    Raises:
        ResourceError: The file cannot be written.
    """
    try:
        writer = gguf.GGUFWriter(path, arch="")
        writer.kv_data[0].pop("general.architecture", None)
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [dataset])
        writer.add_uint32("imatrix.chunk_count", max(1, tokens // chunk))
        writer.add_uint32("imatrix.chunk_size", chunk)
        for name, means in sorted(importance.items()):
            sums = np.asarray(means, np.float32) * np.float32(tokens)
            writer.add_tensor(f"{name}.in_sum2", sums[None])
            writer.add_tensor(f"{name}.counts", np.full((1, 1), tokens, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise ResourceError(
            f"cannot write the importance matrix {path}", why=str(error), fix="free disk space"
        ) from error
