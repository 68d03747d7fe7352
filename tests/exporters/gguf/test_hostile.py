"""Files made to harm: only `InputError`, in a second, without a large allocation."""

import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U32,
    array,
    gguf,
    key,
    small,
    string,
    tensor,
    u32,
    u64,
)

from exporters.gguf import cursor, reader
from exporters.gguf.reader import open_gguf
from exporters.inspect import describe
from pipeline.errors import InputError

MAX_SECONDS = 1.0
MAX_BYTES = 8 << 20

NESTED = key("k", ARRAY, array(ARRAY, []) * 5000)
MANY_STRINGS = array(STRING, [string("")] * (1 << 10), claim=cursor.MAX_ARRAY_ELEMENTS + 1)
EXTREMES = (0, 1, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)

CORPUS: dict[str, tuple[bytes, str]] = {
    "string of 2^62 bytes": (gguf([key("k", STRING, u64(1 << 62))]), "claims 46116860184273879"),
    "array of 2^40": (gguf([key("k", ARRAY, u32(U32) + u64(1 << 40) + bytes(64))]), "elements"),
    "array of 30 M": (gguf([key("k", ARRAY, u32(U32) + u64(30_000_000) + bytes(64))]), "elements"),
    "array of 1 M": (gguf([key("k", ARRAY, u32(U32) + u64(1 << 20) + bytes(64))]), "remain"),
    "strings of 1 M": (gguf([key("k", ARRAY, u32(STRING) + u64(1 << 20) + bytes(64))]), "remain"),
    "array over budget": (gguf([key("k", ARRAY, MANY_STRINGS)]), "elements"),
    "nested arrays": (gguf([NESTED]), "array of arrays"),
    "unknown value type": (gguf([key("k", 13, bytes(8))]), "unknown value type 13"),
    "unknown element type": (gguf([key("k", ARRAY, array(99, []))]), "unknown value type 99"),
    "boolean 2": (gguf([key("k", BOOL, b"\2")]), "neither 0 nor 1"),
    "key of 2^60 bytes": (gguf([u64(1 << 60) + bytes(64)]), "key claims"),
    "empty key": (gguf([key("", U32, u32(1))]), "empty key"),
    "duplicate key": (gguf([key("k", U32, u32(1))] * 2), "duplicate key 'k'"),
    "key not UTF-8": (gguf([key(b"\xff", U32, u32(1))]), "not UTF-8 at byte 32"),
    "value not UTF-8": (gguf([key("k", STRING, string(b"a\xc3("))]), "not UTF-8"),
    "surrogate": (gguf([key("k", STRING, string(b"\xed\xa0\x80"))]), "not UTF-8"),
    "2^63 keys": (gguf(n_keys=1 << 63), "key count"),
    "2^16 keys, no bytes": (gguf(n_keys=1 << 16), "key table"),
    "2^40 tensors": (gguf(n_tensors=1 << 40), "tensor count"),
    "2^16 tensors, no bytes": (gguf(n_tensors=1 << 16), "tensor table"),
    "version 2": (gguf(version=2), "version 2"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "rank 2^31": (gguf(tensors=[tensor("t", [4], 0, 0, rank=1 << 31)], data=bytes(16)), "rank"),
    "rank 0": (gguf(tensors=[tensor("t", [4], 0, 0, rank=0)], data=bytes(16)), "rank 0"),
    "rank 5": (gguf(tensors=[tensor("t", [1] * 5, 0, 0)], data=bytes(4)), "rank 5"),
    "no name": (gguf(tensors=[tensor("", [4], 0, 0)], data=bytes(16)), "tensor ''"),
    "long name": (gguf(tensors=[tensor("t" * 64, [4], 0, 0)], data=bytes(16)), "limit is 63"),
    "dimension 0": (gguf(tensors=[tensor("t", [4, 0], 0, 0)]), "positive"),
    "overflowing dimensions": (
        gguf(tensors=[tensor("t", [1 << 62, 1 << 62, 1 << 62, 64], 0, 0)], data=bytes(64)),
        "the file at",
    ),
    "wrapping to 64 bytes": (
        gguf(tensors=[tensor("t", [(1 << 62) + 16], 0, 0)], data=bytes(64)),
        "the file at",
    ),
    "partial block": (gguf(tensors=[tensor("t", [33], 2, 0)], data=bytes(64)), "multiple of 32"),
    "removed type": (gguf(tensors=[tensor("t", [32], 31, 0)], data=bytes(64)), "ggml type 31"),
    "type 2^31": (gguf(tensors=[tensor("t", [32], 1 << 31, 0)], data=bytes(64)), "ggml type"),
    "past the end": (gguf(tensors=[tensor("t", [32], 0, 0)], data=bytes(64)), "the file at"),
    "offset 2^62": (gguf(tensors=[tensor("t", [4], 0, 1 << 62)], data=bytes(16)), "data offset"),
    "shared bytes": (
        gguf(tensors=[tensor("t", [8], 0, 0), tensor("u", [8], 0, 0)], data=bytes(64)),
        "claims data offset 0, expected 32",
    ),
    "gap": (
        gguf(tensors=[tensor("t", [8], 0, 0), tensor("u", [8], 0, 64)], data=bytes(128)),
        "claims data offset 64, expected 32",
    ),
    "unsorted": (
        gguf(tensors=[tensor("t", [8], 0, 32), tensor("u", [8], 0, 0)], data=bytes(64)),
        "expected 0",
    ),
    "duplicate tensor": (
        gguf(tensors=[tensor("t", [8], 0, 0), tensor("t", [8], 0, 32)], data=bytes(64)),
        "duplicate tensor 't'",
    ),
    "trailing bytes": (small() + bytes(64), "follow the last tensor"),
    "no tensors, trailing": (gguf([key("k", U32, u32(1))], data=bytes(64)), "follow"),
    "alignment 0": (gguf([key("general.alignment", U32, u32(0))]), "power of two"),
    "alignment 3": (gguf([key("general.alignment", U32, u32(3))]), "power of two"),
    "alignment as text": (gguf([key("general.alignment", STRING, string("32"))]), "32-bit"),
    "alignment as float": (gguf([key("general.alignment", F32, bytes(4))]), "32-bit"),
    "control characters": (gguf([key("\x1b[2J\u202e", U32, u32(1))] * 2), r"\\x1b\[2J\\u202e"),
}


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[[bytes], InputError | None]:
    """Describes a file and touches all its tensors within the limits; returns the refusal."""
    path = tmp_path / "file.gguf"

    def run(content: bytes) -> InputError | None:
        path.write_bytes(content)
        start = time.perf_counter()
        refusal = None
        try:
            shown = describe(path)
            with open_gguf(path) as file:
                assert sum(file.raw(name).size for name in file.tensors) <= len(content)
            texts = [*shown.metadata, *shown.metadata.values(), *(t.name for t in shown.tensors)]
            assert all(text.isprintable() for text in texts)
        except InputError as error:
            refusal = error
        assert time.perf_counter() - start < MAX_SECONDS
        return refusal

    return run


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(name: str, attempt: Callable[[bytes], InputError | None]) -> None:
    content, pattern = CORPUS[name]
    tracemalloc.start()
    try:
        refusal = attempt(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES
    assert refusal is not None
    with pytest.raises(InputError, match=pattern):
        raise refusal
    assert "at byte" in refusal.what
    assert str(refusal).isascii()


def test_every_truncation(attempt: Callable[[bytes], InputError | None]) -> None:
    whole = small()
    assert attempt(whole) is None
    assert attempt(whole + bytes(12)) is None  # final padding
    for length in range(len(whole)):
        assert attempt(whole[:length]) is not None, length


@pytest.mark.parametrize("seed", range(4))
def test_random_mutations(seed: int, attempt: Callable[[bytes], InputError | None]) -> None:
    rng = random.Random(seed)
    whole, refused = small(), 0
    tracemalloc.start()
    try:
        for _ in range(1000):
            refused += attempt(mutate(rng, whole)) is not None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES
    assert refused > 300


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Some bytes flipped, removed, inserted, or a whole integer replaced by an extreme one."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                del changed[at : at + rng.randint(1, 9)]
            case 2:
                changed[at:at] = rng.randbytes(rng.randint(1, 9))
            case _:
                width = rng.choice((4, 8))
                value = rng.choice(EXTREMES) % (1 << 8 * width)
                changed[at : at + width] = value.to_bytes(width, "little")
    return bytes(changed)


def test_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.gguf"
    path.write_bytes(small())
    for module, name, limit, pattern in (
        (cursor, "MAX_HEADER_BYTES", 64, "header is larger than 64"),
        (cursor, "MAX_ARRAY_ELEMENTS", 4, "claims 2 elements"),
        (reader, "MAX_KEYS", 6, "key count is 7"),
        (reader, "MAX_TENSORS", 2, "tensor count is 3"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, limit)
            with pytest.raises(InputError, match=pattern):
                open_gguf(path)
