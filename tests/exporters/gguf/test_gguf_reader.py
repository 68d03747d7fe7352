"""The strict reader against the `gguf` library's writer, and its description of valid files."""

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import small

from exporters.gguf.reader import open_gguf
from exporters.gguf.type_sizes import GGML_TYPES
from pipeline.errors import InputError

RNG = np.random.default_rng(0)


def write(path: Path, tensors: dict[str, np.ndarray], **arrays: list) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_add_bos_token(False)
    for name, values in arrays.items():
        writer.add_array(name, values)
    for name, values in tensors.items():
        quantized = values.dtype == np.uint8
        kind = gguf.GGMLQuantizationType.Q4_0 if quantized else None
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    dense = RNG.standard_normal((6, 64)).astype(np.float32)
    packed = gguf.quants.quantize(dense, gguf.GGMLQuantizationType.Q4_0)
    tensors = {"a.weight": dense, "b.weight": packed, "c.bias": dense[0, :5]}
    words = ["plain", "", "Ġwörld", "日本"]
    with open_gguf(write(tmp_path / "m", tensors, words=words, ids=[1, -2, 3])) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["llama.block_count"] == 3
        assert file.metadata["llama.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
        assert file.metadata["tokenizer.ggml.add_bos_token"] is False
        assert file.metadata["words"] == words
        assert file.metadata["ids"] == [1, -2, 3]
        assert list(file.tensors) == list(tensors)
        assert file.tensors["b.weight"].shape == (6, 64)
        assert file.tensors["b.weight"].type_name == "Q4_0"
        assert file.raw("b.weight").shape == (6, 36)
        np.testing.assert_array_equal(file.raw("b.weight"), packed)
        np.testing.assert_array_equal(file.raw("a.weight").view(np.float32), dense)
        np.testing.assert_array_equal(file.raw("c.bias").view(np.float32), dense[:1, :5])


def test_views_are_read_only_and_survive_closing(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(small())
    with open_gguf(path) as file:
        raw = file.raw("one.weight")
        with pytest.raises(InputError, match=r"no tensor 'missing'"):
            file.raw("missing")
    assert not raw.flags.writeable
    assert raw.tobytes() == bytes(range(72))
    with pytest.raises(ValueError, match="closed"):
        file.raw("one.weight")


@pytest.mark.parametrize("kind", gguf.GGMLQuantizationType)
def test_type_sizes_agree_with_the_library(kind: gguf.GGMLQuantizationType) -> None:
    if kind.name == "Q8_1":
        pytest.skip("gguf-py counts float32 fields; ggml-common.h has fp16 (36 bytes)")
    ours = GGML_TYPES[kind.value]
    assert (ours.name, (ours.block, ours.nbytes)) == (kind.name, gguf.GGML_QUANT_SIZES[kind])


def test_large_vocabulary_takes_about_a_second(tmp_path: Path) -> None:
    count = 150_000
    arrays = {
        "tokens": [f"token{i}" for i in range(count)],
        "merges": [f"to ken{i}" for i in range(count)],
        "types": [1] * count,
    }
    path = write(tmp_path / "m", {"a": np.zeros(4, np.float32)}, **arrays)
    start = time.perf_counter()
    with open_gguf(path) as file:
        assert file.metadata["tokens"] == arrays["tokens"]
    assert time.perf_counter() - start < 2
