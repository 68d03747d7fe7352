"""Builds GGUF files byte by byte, so that every field can lie."""

import struct
from collections.abc import Sequence

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + u32(kind) + value


def array(kind: int, items: Sequence[bytes], *, claim: int | None = None) -> bytes:
    return u32(kind) + u64(len(items) if claim is None else claim) + b"".join(items)


def tensor(
    name: str, dims: Sequence[int], kind: int, offset: int, rank: int | None = None
) -> bytes:
    sizes = b"".join(u64(dim) for dim in dims)
    return string(name) + u32(len(dims) if rank is None else rank) + sizes + u32(kind) + u64(offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = b"GGUF" + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(tensors)
    padding = b"\0" * (-len(head) % alignment) if tensors else b""
    return head + padding + data


def small() -> bytes:
    """A valid file: every kind of value, a Q4_0, an F32 and a 1-D tensor; no final padding."""
    keys = [
        key("general.architecture", STRING, string("llama")),
        key("general.alignment", U32, u32(32)),
        key("a.flag", BOOL, b"\1"),
        key("a.float", F32, struct.pack("<f", 0.5)),
        key("a.big", U64, u64(1 << 40)),
        key("a.words", ARRAY, array(STRING, [string("één"), string(""), string("two")])),
        key("a.numbers", ARRAY, array(I32, [struct.pack("<i", v) for v in (-1, 2)])),
    ]
    tensors = [
        tensor("one.weight", [64, 2], 2, 0),
        tensor("two.weight", [3, 2], 0, 96),
        tensor("three.bias", [5], 0, 128),
    ]
    data = bytes(range(72)) + bytes(24) + bytes(24) + bytes(8) + bytes(20)
    return gguf(keys, tensors, data)
