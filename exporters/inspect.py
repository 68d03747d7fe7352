"""What is inside a model file: container, metadata, tensors, and bits per weight of each type.

Nothing in the file is executed or rendered; chat templates are shown as the text they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exporters.gguf.cursor import Value
from exporters.gguf.reader import open_gguf
from exporters.safetensors_header import read_header
from exporters.untrusted import HEAD_BYTES, container_of, open_regular, shown

MAX_SHOWN_CHARACTERS = 100
MAX_SHOWN_ELEMENTS = 4


@dataclass(frozen=True)
class TensorSummary:
    """One tensor: printable name, type, shape in torch order, size in bytes."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Total:
    """Sum over tensors: how many, their elements, their bytes."""

    tensors: int
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Storage cost including scales; 0 without parameters."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Description:
    """Contents of a model file. All strings are escaped and shortened: safe for a terminal.

    Attributes:
        path: The file.
        container: ``gguf`` or ``safetensors``.
        file_bytes: Size of the whole file.
        metadata: Printable values by key.
        tensors: In file order.
        by_type: Totals by tensor type, largest first.
        total: Over all tensors.
    """

    path: Path
    container: str
    file_bytes: int
    metadata: dict[str, str]
    tensors: tuple[TensorSummary, ...]
    by_type: dict[str, Total]
    total: Total


def describe(path: Path) -> Description:
    """Describe a GGUF or safetensors file, recognised by its content.

    Raises:
        InputError: Damaged, hostile, or another kind of file (Git-LFS pointer, pickle ...).
        ResourceError: No permission to read it.
    """
    path = Path(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        container = container_of(file.read(HEAD_BYTES), path)
        if container == "safetensors":
            file.seek(0)
            metadata, entries = read_header(file, size, path)
            return _describe(
                path,
                container,
                size,
                metadata.items(),
                [TensorSummary(shown(e.name), e.dtype, e.shape, e.nbytes) for e in entries],
            )
    with open_gguf(path) as gguf:
        return _describe(
            path,
            container,
            size,
            gguf.metadata.items(),
            [
                TensorSummary(shown(info.name), info.type_name, info.shape, info.nbytes)
                for info in gguf.tensors.values()
            ],
        )


def _describe(
    path: Path,
    container: str,
    size: int,
    metadata: Iterable[tuple[str, Value]],
    tensors: list[TensorSummary],
) -> Description:
    groups: dict[str, list[TensorSummary]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type_name, []).append(tensor)
    by_type = {name: _total(group) for name, group in groups.items()}
    return Description(
        path=path,
        container=container,
        file_bytes=size,
        metadata={shown(key): _printable(value) for key, value in metadata},
        tensors=tuple(tensors),
        by_type=dict(sorted(by_type.items(), key=lambda item: -item[1].nbytes)),
        total=_total(tensors),
    )


def _total(tensors: list[TensorSummary]) -> Total:
    return Total(len(tensors), sum(t.parameters for t in tensors), sum(t.nbytes for t in tensors))


def _printable(value: Value) -> str:
    if isinstance(value, str):
        return shown(value, MAX_SHOWN_CHARACTERS)
    if not isinstance(value, list):
        return str(value)
    parts = [
        repr(shown(item, MAX_SHOWN_CHARACTERS // MAX_SHOWN_ELEMENTS))
        if isinstance(item, str)
        else str(item)
        for item in value[:MAX_SHOWN_ELEMENTS]
    ]
    more = f", ... ({len(value)} elements)" if len(value) > MAX_SHOWN_ELEMENTS else ""
    return f"[{', '.join(parts)}{more}]"
