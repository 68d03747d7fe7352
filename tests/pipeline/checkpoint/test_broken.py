"""Every way a checkpoint can be broken is named, with the file, and none gets through."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoint import open_checkpoint
from pipeline.errors import InputError, PipelineError, UnsupportedError
from tests.pipeline.checkpoint.files import (
    INDEX,
    WEIGHTS,
    edited,
    edited_weights,
    header_bytes,
    shard,
)

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
HTML = b"<!DOCTYPE html><html><body>Access denied</body></html>"


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    content, header = path.read_bytes(), header_bytes(path)
    inside = np.random.default_rng(0).integers(header, len(content), 200).tolist()
    for length in [*range(header + 1), *inside, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"model\.safetensors"):
            open_checkpoint(folder)


def test_a_flipped_header_never_crashes(folder: Path) -> None:
    path = folder / WEIGHTS
    content, header = path.read_bytes(), header_bytes(path)
    points = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        broken = bytearray(content)
        broken[points.integers(header)] ^= 1 << int(points.integers(8))
        path.write_bytes(broken)
        try:
            open_checkpoint(folder)
        except PipelineError:
            refused += 1
    assert refused > 300  # what passes is a harmless change, such as one in the metadata


@pytest.mark.parametrize("extra", [b"\0", b"x" * 100])
def test_trailing_bytes_are_refused(folder: Path, extra: bytes) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes() + extra)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (LFS, "Git-LFS pointer"),
        (HTML, "web page"),
        (b"\x80\x02}q\x00.", "ickle"),
        (b"PK\x03\x04" + bytes(60), "zip archive"),
        (b"GGUF\x03\0\0\0" + bytes(60), "GGUF"),
        ((10**14).to_bytes(8, "little") + b"{}", "header claims"),
        ((2).to_bytes(8, "little") + b"[]", "JSON|safetensors"),
        ((15).to_bytes(8, "little") + b'{"a":{},"a":{}}', "duplicate"),
    ],
)
def test_a_weight_file_of_another_kind_is_named(folder: Path, content: bytes, named: str) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match=named) as caught:
        open_checkpoint(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "empty"),
        (LFS, "Git-LFS pointer"),
        (HTML, "web page"),
        (b"{", "no valid JSON"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b"[]", "not an object"),
        (b'{"a": "\xff"}', "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
    ],
)
def test_a_json_file_that_is_none_is_named(
    folder: Path, name: str, content: bytes, named: str
) -> None:
    shard(folder)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=named) as caught:
        open_checkpoint(folder)
    assert str(folder / name) in str(caught.value)


def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        open_checkpoint(folder)


def test_an_unknown_architecture_is_refused_before_the_weights_are_looked_at(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with edited(folder) as config:
        config["model_type"] = "mamba"
    with pytest.raises(UnsupportedError, match="mamba"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_weight_that_is_not_finite_is_named(
    folder: Path, value: float, dtype: torch.dtype
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with edited_weights(folder) as tensors:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][3, 5] = value
        tensors[name][100, 2] = value
    checkpoint = open_checkpoint(folder)
    checkpoint.read("model.layers.0.mlp.gate_proj.weight")
    with pytest.raises(InputError) as caught:
        checkpoint.read(name)
    assert name in caught.value.what
    assert str(folder / WEIGHTS) in caught.value.what
    assert f"flat index {3 * 64 + 5}" in caught.value.what


def test_a_value_that_overflows_in_the_wanted_type_is_named(folder: Path) -> None:
    name = "model.norm.weight"
    with edited_weights(folder) as tensors:
        tensors[name][7] = 1e5
    checkpoint = open_checkpoint(folder)
    assert checkpoint.read(name)[7] > 65504
    with pytest.raises(InputError, match="flat index 7") as caught:
        checkpoint.read(name, dtype=torch.float16)
    assert "overflows" in caught.value.why


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    with edited_weights(folder) as tensors:
        del tensors[name]
    with pytest.raises(InputError, match=f"missing: '{name}'"):
        open_checkpoint(folder)


def test_a_wrong_shape_is_named(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    with edited_weights(folder) as tensors:
        tensors[name] = tensors[name].T
    with pytest.raises(InputError, match=r"k_proj.*\[64, 32\].*\[32, 64\]"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_not_plain_floats_are_refused(folder: Path, dtype: torch.dtype) -> None:
    with edited_weights(folder) as tensors:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    first, _ = shard(folder)
    first.unlink()
    with pytest.raises(InputError, match=first.name):
        open_checkpoint(folder)


def test_a_truncated_shard_is_named(folder: Path) -> None:
    _, second = shard(folder)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(InputError, match=second.name):
        open_checkpoint(folder)


def test_an_index_that_names_the_wrong_shard_is_refused(folder: Path) -> None:
    first, second = shard(folder)
    with edited(folder, INDEX) as index:
        name = next(n for n, file in index["weight_map"].items() if file == first.name)
        index["weight_map"][name] = second.name
    with pytest.raises(InputError, match=f"{INDEX} is wrong: tensor '{name}'"):
        open_checkpoint(folder)


def test_an_index_with_a_tensor_that_no_shard_has_is_refused(folder: Path) -> None:
    first, _ = shard(folder)
    with edited(folder, INDEX) as index:
        index["weight_map"]["model.ghost"] = first.name
    with pytest.raises(InputError, match=r"model\.ghost"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    first, second = shard(folder)
    shutil.copy(first, second)
    with pytest.raises(InputError, match="two shards"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "..", "", "sub/x.safetensors", "a\\b", "c:x", "x\0y", 7, None],
)
def test_a_shard_name_that_leads_elsewhere_is_refused(folder: Path, name: object) -> None:
    first, _ = shard(folder)
    shutil.copy(first, folder.parent / "outside.safetensors")
    with edited(folder, INDEX) as index:
        index["weight_map"] = {
            key: name if file == first.name else file for key, file in index["weight_map"].items()
        }
    with pytest.raises(InputError, match="plain file name"):
        open_checkpoint(folder)


def test_an_absolute_shard_name_is_refused(folder: Path) -> None:
    first, _ = shard(folder)
    with edited(folder, INDEX) as index:
        index["weight_map"] = {key: str(first) for key in index["weight_map"]}
    with pytest.raises(InputError, match="plain file name"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_an_index_without_a_map_is_refused(folder: Path, content: dict[str, object]) -> None:
    shard(folder)
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(InputError, match="weight_map"):
        open_checkpoint(folder)


def test_shards_without_an_index_are_not_guessed_together(folder: Path) -> None:
    first, _ = shard(folder)
    (folder / INDEX).unlink()
    with pytest.raises(InputError, match="no weights") as caught:
        open_checkpoint(folder)
    assert first.name in caught.value.why
    assert "index" in caught.value.fix


class Payload:
    """What unpickling calls is a command of the file's author."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_pickle_never_runs_code(folder: Path, allow_pickle: bool) -> None:
    canary = folder / "canary"
    (folder / WEIGHTS).unlink()
    torch.save({"model.norm.weight": Payload(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled"):
        open_checkpoint(folder, allow_pickle=allow_pickle)
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", HTML, b"PK\x03\x04 but no archive"])
def test_a_broken_pickle_is_named(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        open_checkpoint(folder, allow_pickle=True)


def test_a_pickle_of_something_else_is_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="other than tensors"):
        open_checkpoint(folder, allow_pickle=True)


def test_a_file_that_changes_after_opening_is_named(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="cannot read tensor"):
        checkpoint.read("model.norm.weight")
