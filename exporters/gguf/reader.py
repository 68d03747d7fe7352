"""A strict, memory-bounded reader of GGUF version 3 files (little-endian).

It accepts what stock writers produce and refuses everything else: extents must follow one another
without gaps, overlaps or trailing bytes, so two readers can never see different tensors.

Specification: docs/gguf.md of the ggml project; block sizes: ggml-common.h.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from exporters.gguf.cursor import MAX_KEY_BYTES, UINT32, Cursor, Value
from exporters.gguf.type_sizes import GGML_TYPES
from exporters.untrusted import HEAD_BYTES, container_of, open_regular, quoted
from pipeline.errors import InputError

__all__ = ["GGUFFile", "TensorInfo", "open_gguf", "quoted"]

VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME without its terminator
_MIN_KEY_BYTES = 8 + 1 + 4 + 1  # length, one character, value type, smallest value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # length, character, rank, one dimension, type, offset


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file and how to read it.

    Attributes:
        name: Name in the file.
        type_id: ggml type number.
        type_name: ggml type name, ``Q4_0`` style.
        shape: Torch order, [out, in] for a linear.
        offset: First byte, counted from the start of the file.
        nbytes: Size without padding.
    """

    name: str
    type_id: int
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Product of all dimensions but the last."""
        return math.prod(self.shape[:-1])


class GGUFFile:
    """An open GGUF file. Use as a context manager.

    Attributes:
        path: The file.
        metadata: Key-value pairs; arrays are lists.
        tensors: Tensors by name, in file order.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, Value],
        tensors: Mapping[str, TensorInfo],
        data: mmap.mmap,
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.tensors = dict(tensors)
        self._bytes: np.ndarray | None = np.frombuffer(data, dtype=np.uint8)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapping; arrays from `raw` that are still in use keep it alive."""
        self._bytes = None

    def raw(self, name: str) -> np.ndarray:
        """Bytes of a tensor as a read-only view of the file, uint8 [rows, row bytes].

        Raises:
            InputError: The file has no such tensor.
        """
        info = self.tensors.get(name)
        if info is None:
            raise InputError(f"{self.path} has no tensor {quoted(name)}")
        if self._bytes is None:
            raise ValueError("the GGUF file is closed")
        return self._bytes[info.offset : info.offset + info.nbytes].reshape(info.rows, -1)


def open_gguf(path: Path) -> GGUFFile:
    """Open and check a GGUF file; tensor data stay on disk until `GGUFFile.raw`.

    Raises:
        InputError: Not a well-formed GGUF v3 file; says what is wrong and at which byte.
        ResourceError: No permission to read it.
    """
    path = Path(path)
    with open_regular(path) as file:
        if container_of(file.read(HEAD_BYTES), path) != "gguf":
            raise InputError(f"{path} is a safetensors file", fix="name a .gguf file")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = Cursor(data, path, position=4)
    n_tensors, n_keys = _read_counts(cursor)
    metadata = _read_metadata(cursor, n_keys)
    declared = [_read_tensor(cursor) for _ in range(n_tensors)]
    tensors = _lay_out(cursor, declared, _alignment(cursor, metadata), len(data))
    return GGUFFile(path, metadata, tensors, data)


def _read_counts(cursor: Cursor) -> tuple[int, int]:
    version = cursor.u32("version")
    if version != VERSION:
        kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
        raise cursor.error(f"{kind} GGUF; only little-endian version {VERSION} is read", at=4)
    n_tensors, n_keys = cursor.u64("tensor count"), cursor.u64("key count")
    for count, limit, least, what in (
        (n_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES, "tensor"),
        (n_keys, MAX_KEYS, _MIN_KEY_BYTES, "key"),
    ):
        if count > limit:
            raise cursor.error(f"{what} count is {count}, the limit is {limit}", at=8)
        cursor.require(count * least, f"{what} table")
    return n_tensors, n_keys


def _read_metadata(cursor: Cursor, n_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(n_keys):
        start = cursor.position
        key = cursor.string("key", MAX_KEY_BYTES)
        if not key or key in metadata:
            problem = "duplicate" if key else "empty"
            raise cursor.error(f"{problem} key {quoted(key)}", at=start)
        kind = cursor.u32(f"value type of {quoted(key)}")
        if key == "general.alignment" and kind != UINT32:
            raise cursor.error("general.alignment is not a 32-bit unsigned integer", at=start)
        metadata[key] = cursor.value(kind, f"value of {quoted(key)}")
    return metadata


def _alignment(cursor: Cursor, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"alignment {alignment} is not a power of two")
    return alignment


def _read_tensor(cursor: Cursor) -> TensorInfo:
    """One entry of the tensor table; `offset` is still relative to the data section."""
    start = cursor.position
    name = cursor.string("tensor name", MAX_NAME_BYTES)
    what = f"tensor {quoted(name)}"
    rank = cursor.u32(f"rank of {what}")
    if not name or not 1 <= rank <= MAX_DIMENSIONS:
        raise cursor.error(f"{what} has rank {rank} (1..{MAX_DIMENSIONS} allowed)", at=start)
    dimensions = [cursor.u64(f"dimension of {what}") for _ in range(rank)]
    type_id = cursor.u32(f"type of {what}")
    offset = cursor.u64(f"offset of {what}")
    kind = GGML_TYPES.get(type_id)
    if kind is None:
        raise cursor.error(f"{what} has unknown ggml type {type_id}", at=start)
    if 0 in dimensions or dimensions[0] % kind.block:
        raise cursor.error(
            f"{what} of type {kind.name} has dimensions {dimensions}",
            at=start,
            why=f"all must be positive and the first a multiple of {kind.block}",
        )
    nbytes = math.prod(dimensions) // kind.block * kind.nbytes
    return TensorInfo(name, type_id, kind.name, tuple(reversed(dimensions)), offset, nbytes)


def _lay_out(
    cursor: Cursor, declared: list[TensorInfo], alignment: int, file_size: int
) -> dict[str, TensorInfo]:
    """Check that the tensors cover the data section back to back, and make offsets absolute."""
    base = _padded(cursor.position, alignment)
    end = cursor.position  # a file without tensors need not be padded
    tensors: dict[str, TensorInfo] = {}
    for info in declared:
        start = _padded(end, alignment)
        what = f"tensor {quoted(info.name)}"
        if info.name in tensors:
            raise cursor.error(f"duplicate {what}")
        if base + info.offset != start:
            raise cursor.error(
                f"{what} claims data offset {info.offset}, expected {start - base}",
                why="tensors must follow one another without gap or overlap",
            )
        end = start + info.nbytes
        if end > file_size:
            raise cursor.error(f"{what} ends at {end}, the file at {file_size}", at=start)
        tensors[info.name] = TensorInfo(
            info.name, info.type_id, info.type_name, info.shape, start, info.nbytes
        )
    if file_size > _padded(end, alignment):
        raise cursor.error(f"{file_size - end} bytes follow the last tensor", at=end)
    return tensors


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
