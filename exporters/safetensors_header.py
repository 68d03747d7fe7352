"""A strict reader of safetensors headers (format specification: README of safetensors).

The `safetensors` library reads our own checkpoints; this one looks at files of unknown origin and
names the problem, the tensor and the byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from exporters.untrusted import quoted, shown
from pipeline.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # specification
MAX_TENSORS = 1 << 17
MAX_ELEMENTS = 1 << 62
MAX_COMMAS = 8 * MAX_TENSORS
_PREFIX_BYTES = 8

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class SafetensorsEntry:
    """One tensor of a safetensors file.

    Attributes:
        name: Name in the file.
        dtype: As the file spells it.
        shape: Torch order.
        offset: First byte, counted from the start of the file.
        nbytes: Size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(
    file: BinaryIO, size: int, path: Path
) -> tuple[dict[str, str], list[SafetensorsEntry]]:
    """Read and check the header of an open safetensors file.

    Args:
        file: At position 0.
        size: Size of the file in bytes.
        path: Used in messages.

    Returns:
        The ``__metadata__`` map, and the tensors in the order of their bytes.

    Raises:
        InputError: Not a well-formed safetensors file.
    """
    length = int.from_bytes(file.read(_PREFIX_BYTES), "little")
    if length > MAX_HEADER_BYTES or length > size - _PREFIX_BYTES:
        why = f"the limit is {MAX_HEADER_BYTES}, and {size - _PREFIX_BYTES} bytes follow"
        raise _error(path, f"header claims {length} bytes", 0, why)
    header = _parse(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _error(path, "__metadata__ is not a map of strings", _PREFIX_BYTES)
    data_start = _PREFIX_BYTES + length
    entries = [_entry(name, fields, data_start, path) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_cover(entries, data_start, size, path)
    return metadata, entries


def _error(path: Path, what: str, at: int, why: str = "") -> InputError:
    return InputError(
        f"{path}: {what} at byte {at}",
        why=why,
        fix="the file is damaged or was made to harm; download or export it again",
    )


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    """The header as a dict; bounded work, duplicate keys and non-finite numbers refused."""
    brackets = raw.count(b"[") + raw.count(b"{")
    if brackets > 4 * MAX_TENSORS or raw.count(b",") > MAX_COMMAS:
        why = f"{brackets} brackets; the limit is {MAX_TENSORS} tensors"
        raise _error(path, "header has too many entries", _PREFIX_BYTES, why)
    try:
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        where = getattr(error, "pos", getattr(error, "start", 0))
        why = shown(str(error), 200)
        raise _error(path, "header is not valid JSON", _PREFIX_BYTES + where, why) from error
    if not isinstance(header, dict):
        raise _error(path, "header is not a JSON object", _PREFIX_BYTES)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name!r}")
        found[name] = value
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ELEMENTS


def _entry(name: str, fields: object, data_start: int, path: Path) -> SafetensorsEntry:
    what = f"tensor {quoted(name)}"
    if not isinstance(fields, Mapping) or set(fields) != {"dtype", "shape", "data_offsets"}:
        why = "it needs exactly dtype, shape and data_offsets"
        raise _error(path, f"{what} is not described", _PREFIX_BYTES, why)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _error(path, f"{what} has unknown dtype {quoted(str(dtype))}", _PREFIX_BYTES)
    for sizes in (shape, offsets):
        if not isinstance(sizes, list) or not all(_is_size(size) for size in sizes):
            raise _error(path, f"{what} has a shape or offset that is no size", _PREFIX_BYTES)
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
        if bits > MAX_ELEMENTS:
            raise _error(path, f"{what} is larger than any file", _PREFIX_BYTES)
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != bits:
        why = f"shape and dtype need {bits} bits"
        raise _error(path, f"{what} has data_offsets {shown(str(offsets))}", _PREFIX_BYTES, why)
    return SafetensorsEntry(name, dtype, tuple(shape), data_start + offsets[0], bits // 8)


def _check_cover(entries: list[SafetensorsEntry], start: int, size: int, path: Path) -> None:
    """Refuse unless the tensors, in the order of their bytes, cover the rest of the file once."""
    for entry in entries:
        if entry.offset != start:
            kind = "a gap before" if entry.offset > start else "an overlap with"
            raise _error(path, f"{kind} tensor {quoted(entry.name)}", start)
        start += entry.nbytes
    if start < size:
        raise _error(path, f"{size - start} bytes follow the last tensor", start)
    if start > size:
        raise _error(path, f"the last tensor ends at {start}, the file", size)
