"""The strict safetensors header reader against the library, and against files made to harm."""

import json
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exporters import safetensors_header
from exporters.inspect import describe
from pipeline.errors import InputError

GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def container(header: Any, data: bytes = bytes(32), *, claim: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if claim is None else claim).to_bytes(8, "little") + raw + data


def changed(name: str, **fields: Any) -> bytes:
    return container({**GOOD, name: {**GOOD[name], **fields}})


def raw_entry(text: str) -> bytes:
    return container(b'{"a":' + text.encode() + b"}", b"")


CORPUS: dict[str, tuple[bytes, str]] = {
    "header too long": (container(GOOD, claim=1 << 47), "header claims"),
    "header over 100 MB": (container(GOOD, claim=100_000_001), "header claims"),
    "not JSON": (container(b"{]", b""), "not valid JSON at byte 9"),
    "not UTF-8": (container(b'{"\xff":1}', b""), "not valid JSON at byte 10"),
    "deep": (container(b'{"a":' + b"[" * 100_000, b""), "not valid JSON"),
    "too many brackets": (container(b"{" + b"[" * 600_000, b""), "too many entries"),
    "too many keys": (container(b'{"a":1' + b"," * 2_000_000, b""), "too many entries"),
    "huge number": (raw_entry("9" * 5000), "not valid JSON"),
    "NaN": (raw_entry("NaN"), "NaN is not JSON"),
    "duplicate": (container(b'{"a":1,"a":1}', b""), "duplicate key 'a'"),
    "metadata not text": (container({"__metadata__": {"a": 1}}, b""), "map of strings"),
    "metadata a list": (container({"__metadata__": []}, b""), "map of strings"),
    "no fields": (raw_entry("{}"), "not described"),
    "extra field": (changed("a", more=1), "not described"),
    "unknown dtype": (changed("a", dtype="F7"), "unknown dtype 'F7'"),
    "dtype a list": (changed("a", dtype=[]), "unknown dtype"),
    "shape a number": (changed("a", shape=6), "no size"),
    "negative size": (changed("a", shape=[-2, -3]), "no size"),
    "float size": (changed("a", shape=[2.0, 3]), "no size"),
    "boolean size": (changed("a", shape=[True, 6]), "no size"),
    "overflow": (changed("a", shape=[1 << 61, 8, 3]), "larger than any file"),
    "wrong bytes": (changed("a", shape=[2, 4]), "need 256 bits"),
    "one offset": (changed("a", data_offsets=[24]), "data_offsets"),
    "reversed": (changed("a", data_offsets=[24, 0]), "data_offsets"),
    "gap": (changed("b", data_offsets=[26, 34]), "a gap before tensor 'b' at byte"),
    "overlap": (changed("b", data_offsets=[16, 24]), "an overlap with tensor 'b'"),
    "trailing": (container(GOOD, bytes(33)), "1 bytes follow"),
    "missing": (container(GOOD, bytes(31)), "the last tensor ends at"),
    "half a byte": (
        container({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1)),
        "need 12 bits",
    ),
}


def refusal(path: Path) -> InputError | None:
    start = time.perf_counter()
    try:
        describe(path)
    except InputError as error:
        return error
    finally:
        assert time.perf_counter() - start < 1
    return None


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(name: str, tmp_path: Path) -> None:
    content, pattern = CORPUS[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        error = refusal(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert error is not None
    assert "at byte" in error.what
    with pytest.raises(InputError, match=pattern):
        raise error


def test_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {
        "w": torch.zeros(3, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 4),
        "f8": torch.zeros(7).to(torch.float8_e4m3fn),
        "flag": torch.ones(3, dtype=torch.bool),
    }
    path = tmp_path / "file"
    save_file(tensors, path, metadata={"made": "here"})
    found = describe(path)
    assert found.metadata == {"made": "here"}
    assert {t.name: t.shape for t in found.tensors} == {
        k: tuple(v.shape) for k, v in tensors.items()
    }
    assert found.total.nbytes == sum(t.nbytes for t in tensors.values())
    assert found.total.parameters == 26
    assert found.by_type["BF16"].bits_per_weight == 16


@pytest.mark.parametrize("low_byte", range(256))
def test_headers_of_every_length(low_byte: int, tmp_path: Path) -> None:
    """The first byte of the file is that of the length: ``{``, ``P`` or a pickle's 0x80."""
    header = json.dumps(GOOD).encode()
    path = tmp_path / "file"
    path.write_bytes(container(header.ljust(256 + low_byte)))
    assert len(describe(path).tensors) == 2


def test_every_truncation_and_mutation(tmp_path: Path) -> None:
    path = tmp_path / "file"
    whole = container(GOOD)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refusal(path) is not None, length
    rng = random.Random(0)
    refused = 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            content[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
        path.write_bytes(content)
        refused += refusal(path) is not None
    assert refused > 1300


def test_limit_is_that_of_the_specification() -> None:
    assert safetensors_header.MAX_HEADER_BYTES == 100_000_000
