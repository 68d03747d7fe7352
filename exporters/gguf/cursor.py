"""A bounds-checked cursor over the header of a GGUF file.

Nothing is looped over or allocated before its length has been compared with the bytes that remain,
so a header that lies costs no more than the file it came in.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import TypeAlias

from pipeline.errors import InputError

MAX_HEADER_BYTES = 1 << 26  # a 256k-token vocabulary with merges takes about 2^24
MAX_STRING_BYTES = 1 << 22
MAX_KEY_BYTES = (1 << 16) - 1  # GGUF specification
MAX_ARRAY_ELEMENTS = 1 << 21  # over all arrays of a file

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = Scalar | list[Scalar]

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_MIN_BYTES = {BOOL: 1, STRING: 8, **{k: struct.calcsize(f"<{v}") for k, v in _NUMBERS.items()}}


class Cursor:
    """Reads GGUF values front to back.

    Attributes:
        position: Offset of the next byte to read.
    """

    def __init__(self, data: mmap.mmap, path: Path, position: int = 0) -> None:
        self._data = data
        self._path = path
        self._size = len(data)
        self._elements_left = MAX_ARRAY_ELEMENTS
        self.position = position

    def error(self, what: str, *, at: int | None = None, why: str = "") -> InputError:
        """An `InputError` that names the file and the byte offset (default: here)."""
        offset = self.position if at is None else at
        return InputError(
            f"{self._path}: {what} at byte {offset}",
            why=why,
            fix="the file is damaged or was made to harm; download or export it again",
        )

    def require(self, n_bytes: int, what: str) -> None:
        """Refuse unless `n_bytes` more bytes exist and fit the header budget."""
        left = self._size - self.position
        if n_bytes > left:
            raise self.error(f"{what} needs {n_bytes} bytes, {left} remain")
        if self.position + n_bytes > MAX_HEADER_BYTES:
            raise self.error(f"header is larger than {MAX_HEADER_BYTES} bytes")

    def u32(self, what: str) -> int:
        """One unsigned 32-bit integer."""
        self.require(4, what)
        (value,) = _U32.unpack_from(self._data, self.position)
        self.position += 4
        return int(value)

    def u64(self, what: str) -> int:
        """One unsigned 64-bit integer."""
        self.require(8, what)
        (value,) = _U64.unpack_from(self._data, self.position)
        self.position += 8
        return int(value)

    def string(self, what: str, max_bytes: int = MAX_STRING_BYTES) -> str:
        """One length-prefixed UTF-8 string."""
        start = self.position
        length = self.u64(what)
        if length > max_bytes:
            raise self.error(f"{what} claims {length} bytes, the limit is {max_bytes}", at=start)
        self.require(length, what)
        raw = self._data[self.position : self.position + length]
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = self.position + error.start
            raise self.error(f"{what} is not UTF-8", at=at, why=error.reason) from error
        self.position += length
        return text

    def value(self, kind: int, what: str) -> Value:
        """One metadata value of GGUF value type `kind`.

        Returns:
            bool, int, float, str, or a list of one of these.
        """
        if kind == ARRAY:
            return self._array(what)
        return self._read_scalars(kind, 1, what)[0]

    def _array(self, what: str) -> list[Scalar]:
        start = self.position
        kind = self.u32(f"element type of {what}")
        count = self.u64(f"length of {what}")
        if kind == ARRAY:
            raise self.error(f"{what} is an array of arrays, which no model needs", at=start)
        if count > self._elements_left:
            why = f"the limit is {MAX_ARRAY_ELEMENTS} a file"
            raise self.error(f"{what} claims {count} elements", at=start, why=why)
        self._elements_left -= count
        return self._read_scalars(kind, count, what)

    def _read_scalars(self, kind: int, count: int, what: str) -> list[Scalar]:
        """`count` values of one scalar type; the array budget has been charged."""
        if kind not in _MIN_BYTES:
            raise self.error(f"{what} has unknown value type {kind}")
        self.require(count * _MIN_BYTES[kind], what)
        if kind == STRING:
            return [self.string(what) for _ in range(count)]
        if kind == BOOL:
            return self._bools(count, what)
        layout = f"<{count}{_NUMBERS[kind]}"
        values = struct.unpack_from(layout, self._data, self.position)
        self.position += struct.calcsize(layout)
        return list(values)

    def _bools(self, count: int, what: str) -> list[Scalar]:
        raw = self._data[self.position : self.position + count]
        if raw.strip(b"\x00\x01"):
            raise self.error(f"{what} holds a boolean that is neither 0 nor 1")
        self.position += count
        return [byte == 1 for byte in raw]
