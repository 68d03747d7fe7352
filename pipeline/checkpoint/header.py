"""What is in a safetensors file of a checkpoint, from its strictly checked header."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from exporters.safetensors_header import read_header
from exporters.untrusted import HEAD_BYTES, container_of, open_regular
from pipeline.errors import InputError


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it looks like.

    Attributes:
        file: The file that holds it.
        dtype: Type name of the safetensors format (``BF16``).
        shape: As stored.
        nbytes: Size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file by name.

    Our own reader comes before the library, which accepts duplicate keys and does not say where a
    file is broken.

    Raises:
        InputError: Missing, truncated, of another kind, or not what the format allows. Names the
            file and the byte.
        ResourceError: No permission to read it.
    """
    with open_regular(path) as file:
        if container_of(file.read(HEAD_BYTES), path) != "safetensors":
            raise InputError(f"{path} is a GGUF file", fix="give the original checkpoint")
        file.seek(0)
        _, entries = read_header(file, os.fstat(file.fileno()).st_size, path)
    return {e.name: TensorInfo(path, e.dtype, e.shape, e.nbytes) for e in entries}
