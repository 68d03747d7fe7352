"""Importance matrices in llama.cpp's GGUF format, written and read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from exporters.gguf.reader import GGUFFile, open_gguf
from pipeline.errors import InputError, ResourceError

SUMS, COUNTS = ".in_sum2", ".counts"


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
            writer.add_tensor(f"{name}{SUMS}", sums[None])
            writer.add_tensor(f"{name}{COUNTS}", np.full((1, 1), tokens, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise ResourceError(
            f"cannot write the importance matrix {path}", why=str(error), fix="free disk space"
        ) from error


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """Mean squared inputs, float32 [in], by the GGUF name of the matrix.

    Matrices that no token reached (a count of 0) are left out.

    Args:
        path: What llama-imatrix or `write_imatrix` wrote, in GGUF.

    Raises:
        InputError: The file is missing, damaged, in the older format, holds matrices of experts, or
            sums that are not finite or negative.
    """
    found: dict[str, np.ndarray] = {}
    with open_gguf(path) as file:
        if file.metadata.get("general.type") != "imatrix":
            raise InputError(
                f"{path} is a GGUF file, but no importance matrix",
                why=f"its general.type is {file.metadata.get('general.type')!r}",
                fix="give what llama-imatrix or --emit imatrix wrote",
            )
        for name in file.tensors:
            if name.endswith(SUMS):
                matrix = name.removesuffix(SUMS)
                sums, counts = (_values(file, f"{matrix}{kind}") for kind in (SUMS, COUNTS))
                if counts.size != 1:
                    raise InputError(
                        f"{path}: {matrix} has counts of {counts.size} experts",
                        fix="importance matrices of dense models are known only",
                    )
                if counts[0] > 0:
                    found[matrix] = sums / counts[0]
    return found


def _values(file: GGUFFile, name: str) -> np.ndarray:
    """All numbers of a float32 tensor, at least 0."""
    values = file.raw(name)
    if file.tensors[name].type_name != "F32":
        raise InputError(f"{file.path}: {name} is not float32")
    values = np.frombuffer(values.tobytes(), "<f4")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise InputError(
            f"{file.path}: {name} holds a NaN, an Inf or a negative number",
            why="sums of squares are none of these",
            fix="make the importance matrix again",
        )
    return values
