"""Importance matrices and reference logits, read as llama.cpp's tools read them."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from exporters.gguf.imatrix import write_imatrix
from exporters.gguf.kld_base import write_kld_base
from pipeline.errors import ResourceError


def test_an_importance_matrix_holds_sums_and_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    means = {f"blk.{n}.ffn_down.weight": rng.random(64).astype(np.float32) for n in (1, 0)}
    write_imatrix(tmp_path / "i.gguf", means, tokens=1000, chunk=100, dataset="text.txt")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert "general.architecture" not in reader.fields
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 10
    assert reader.fields["imatrix.chunk_size"].contents() == 100
    tensors = {t.name: t.data for t in reader.tensors}
    assert len(tensors) == 4
    for name, mean in means.items():
        assert tensors[f"{name}.in_sum2"].shape == (1, 64)
        ratio = tensors[f"{name}.in_sum2"][0] / tensors[f"{name}.counts"][0]
        np.testing.assert_allclose(ratio, mean, rtol=1e-6)


@pytest.mark.parametrize("vocabulary", [32, 33])
def test_reference_logits_come_back_as_log_probabilities(tmp_path: Path, vocabulary: int) -> None:
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocabulary, (3, 8)).astype(np.int32)
    logits = [8 * rng.standard_normal((4, vocabulary)).astype(np.float32) for _ in range(3)]
    logits[1][2] = 5.0  # all equal
    path = tmp_path / "base.bin"
    write_kld_base(path, tokens, iter(logits))
    data = path.read_bytes()
    assert data[:8] == b"_logits_"
    assert struct.unpack("<3i", data[8:20]) == (8, vocabulary, 3)
    at = 20 + 3 * 8 * 4
    assert np.array_equal(np.frombuffer(data[20:at], "<i4").reshape(3, 8), tokens)
    row_bytes = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    assert len(data) == at + 3 * 3 * row_bytes
    for chunk in logits:
        for row in chunk[:3].astype(np.float64):
            step, smallest = struct.unpack("<2f", data[at : at + 8])
            codes = np.frombuffer(data[at + 8 : at + 8 + 2 * vocabulary], "<u2")
            expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
            expected = np.maximum(expected, expected.max() - 16)
            np.testing.assert_allclose(smallest + step * codes, expected, atol=16 / 65535)
            at += row_bytes


def test_failures_are_told(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="importance"):
        write_imatrix(tmp_path / "no" / "i.gguf", {}, tokens=1, chunk=1, dataset="x")
    tokens = np.zeros((2, 8), np.int32)
    with pytest.raises(ResourceError, match="logits"):
        write_kld_base(tmp_path / "no" / "b.bin", tokens, [])
    with pytest.raises(ValueError, match="1 chunks for 2"):
        write_kld_base(tmp_path / "b.bin", tokens, [np.zeros((4, 5), np.float32)])
