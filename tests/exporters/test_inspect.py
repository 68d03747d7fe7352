"""Descriptions of model files, and the names of files that are none."""

import os
import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from exporters.inspect import describe
from exporters.untrusted import shown
from pipeline.errors import InputError

TEMPLATE = "{{ cycler.__init__.__globals__.os.system('touch canary') }}\x1b]0;title\x07" + "x" * 500


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.txt"  # the extension plays no part
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_chat_template(TEMPLATE)
    writer.add_token_list([f"t{i}" for i in range(10)])
    weights = np.zeros((4, 64), np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("q", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("f", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_totals(model: Path) -> None:
    found = describe(model)
    assert found.container == "gguf"
    assert found.file_bytes == model.stat().st_size
    assert [(t.name, t.type_name, t.shape, t.nbytes) for t in found.tensors] == [
        ("q", "Q4_0", (4, 64), 144),
        ("f", "F32", (4, 64), 1024),
    ]
    assert list(found.by_type) == ["F32", "Q4_0"]
    assert found.by_type["Q4_0"].bits_per_weight == 4.5
    assert (found.total.tensors, found.total.parameters, found.total.nbytes) == (2, 512, 1168)


def test_template_is_shown_as_text(model: Path) -> None:
    text = describe(model).metadata["tokenizer.chat_template"]
    assert text.startswith("{{ cycler.__init__")
    assert r"\x1b]0;title\x07" in text
    assert text.endswith(f"... (+{len(TEMPLATE) - 100} characters)")
    assert not (Path.cwd() / "canary").exists()


def test_arrays_are_shortened(model: Path) -> None:
    text = describe(model).metadata["tokenizer.ggml.tokens"]
    assert text == "['t0', 't1', 't2', 't3', ... (10 elements)]"


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git-LFS pointer"),
        (pickle.dumps({"a": 1}), "Python pickle"),
        (b"\n <!DOCTYPE html><html>not found</html>", "web page"),
        (b'<?xml version="1.0"?><Error/>', "web page"),
        (b"{}", "neither GGUF nor safetensors"),
        (b'{"model_type": "llama", "torch_dtype": "float32"}', "neither GGUF nor safetensors"),
        (b"tjgg\x03\0\0\0", "GGJT"),
    ],
)
def test_other_files_are_named(content: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=name):
        describe(path)


def test_torch_checkpoints_are_named(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "new.bin")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="zip archive"):
        describe(tmp_path / "new.bin")
    with pytest.raises(InputError, match="Python pickle"):
        describe(tmp_path / "old.bin")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        describe(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a folder"):
        describe(tmp_path)
    with pytest.raises(InputError, match="cannot open"):
        describe(tmp_path / "missing")
    with pytest.raises(InputError, match="cannot open"):
        describe(Path("nul\0byte"))


def test_shown_escapes_and_shortens() -> None:
    assert shown("a\x00\x9b\u202e\ud800é日") == r"a\x00\x9b\u202e\ud800é日"
    assert shown("x" * 90, 10) == "x" * 10 + "... (+80 characters)"
