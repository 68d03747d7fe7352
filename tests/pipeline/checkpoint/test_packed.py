"""4-bit checkpoints of other tools: read as what they stand for, refused where they cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import open_checkpoint
from pipeline.errors import InputError, UnsupportedError
from tests.packed import write_packed
from tests.tiny import make_checkpoint

METHODS = ("gptq", "gptq_v2", "awq", "compressed-tensors")
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "model", "qwen2")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_read_gives_what_the_integers_stand_for(
    plain: Path, tmp_path: Path, method: str, symmetric: bool
) -> None:
    expected = write_packed(plain, tmp_path / "packed", method, symmetric=symmetric)
    checkpoint = open_checkpoint(tmp_path / "packed")
    assert set(checkpoint.packed) == set(expected)
    assert len(expected) == 2 * 7
    for name, weight in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == torch.float32
        assert torch.equal(found.double(), weight)
    assert any("4-bit already" in note for note in checkpoint.notes)
    assert not any("not part of the model" in note for note in checkpoint.notes)


def test_words_are_those_of_the_compressed_tensors_package(plain: Path, tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    write_packed(plain, tmp_path / "packed", "compressed-tensors", symmetric=False)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    matrix = open_checkpoint(tmp_path / "packed").packed[f"{Q_PROJ}.weight"]
    codes = torch.from_numpy(matrix.codes()).to(torch.int8) - 8
    zeros = torch.from_numpy(matrix.zeros()).to(torch.int8) - 8
    packed = helpers.pack_to_int32(codes, 4)
    assert torch.equal(packed, stored[f"{Q_PROJ}.weight_packed"])
    packed = helpers.pack_to_int32(zeros, 4, packed_dim=0)
    assert torch.equal(packed, stored[f"{Q_PROJ}.weight_zero_point"])


def test_whole_rows_can_share_a_scale(plain: Path, tmp_path: Path) -> None:
    expected = write_packed(plain, tmp_path / "packed", "gptq", symmetric=True, group=-1)
    checkpoint = open_checkpoint(tmp_path / "packed")
    assert {m.group for m in checkpoint.packed.values()} == {64, 128}
    for name, weight in expected.items():
        assert torch.equal(checkpoint.read(name).double(), weight)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("method", "edit", "message"),
    [
        ("gptq", {"bits": 3}, "GPTQ with 3 bits"),
        ("gptq", {"group_size": 0}, "group_size 0"),
        ("awq", {"bits": 8}, "AWQ with 8 bits"),
        ("awq", {"version": "gemv"}, "AWQ version gemv"),
        ("compressed-tensors", {"format": "float-quantized"}, "float-quantized"),
        ("compressed-tensors", {"config_groups": {}}, "several groups"),
        ("awq", {"quant_method": "bitsandbytes"}, "already quantized"),
    ],
)
def test_other_schemes_are_refused(
    plain: Path, tmp_path: Path, method: str, edit: dict[str, Any], message: str
) -> None:
    write_packed(plain, tmp_path / "packed", method, symmetric=True)
    change(tmp_path / "packed", lambda found: found.update(edit))
    with pytest.raises(UnsupportedError, match=message):
        open_checkpoint(tmp_path / "packed")


def test_activations_of_four_bits_are_refused(plain: Path, tmp_path: Path) -> None:
    write_packed(plain, tmp_path / "packed", "compressed-tensors", symmetric=True)

    def edit(found: dict[str, Any]) -> None:
        found["config_groups"]["group_0"]["input_activations"] = {"num_bits": 4}

    change(tmp_path / "packed", edit)
    with pytest.raises(UnsupportedError, match="quantized activations"):
        open_checkpoint(tmp_path / "packed")


def test_damaged_members_are_named(plain: Path, tmp_path: Path) -> None:
    write_packed(plain, tmp_path / "packed", "gptq", symmetric=True)
    path = tmp_path / "packed" / "model.safetensors"
    whole = load_file(path)

    def opening(**changed: torch.Tensor | None) -> None:
        tensors = dict(whole)
        for member, value in changed.items():
            tensors.pop(f"{Q_PROJ}.{member}")
            if value is not None:
                tensors[f"{Q_PROJ}.{member}"] = value
        save_file(tensors, path, {"format": "pt"})
        checkpoint = open_checkpoint(tmp_path / "packed")
        checkpoint.packed[f"{Q_PROJ}.weight"].check_order()
        checkpoint.read(f"{Q_PROJ}.weight")

    with pytest.raises(InputError, match=r"scales is missing"):
        opening(scales=None)
    with pytest.raises(InputError, match=r"qzeros is I32 \[2, 8\]"):
        opening(qzeros=torch.zeros(2, 8, dtype=torch.int32))
    with pytest.raises(InputError, match=r"packed integers .* are F32"):
        opening(qweight=torch.zeros(8, 64))
    with pytest.raises(InputError, match="scales is not finite"):
        opening(scales=torch.full((1, 64), float("nan"), dtype=torch.float16))
    scattered = torch.from_numpy(np.random.default_rng(0).permutation(64).astype(np.int32)) // 32
    with pytest.raises(UnsupportedError, match="scattered"):
        opening(g_idx=scattered)
    named = {k.replace("qweight", "weight"): v for k, v in whole.items()}
    save_file(named, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"no tensor is called \.\.\.qweight"):
        open_checkpoint(tmp_path / "packed")
