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

from pipeline.checkpoint import PackedMatrix, open_checkpoint
from pipeline.checkpoint.packed import find_scheme
from pipeline.checkpoint.weights import Weights
from pipeline.errors import InputError, UnsupportedError
from tests.packed import settings, write_packed
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


def words_of(method: str, member: str, values: list[int]) -> PackedMatrix:
    """A matrix of 8 x 8 whose `member` holds eight times the same words."""
    data = torch.tensor(values, dtype=torch.int64).to(torch.int32)
    shape = (1, 8) if method.startswith("gptq") and member == "qweight" else (8, 1)
    loaders = {f"x.{member}": lambda: data.expand(8).reshape(shape)}
    scheme = find_scheme({"quantization_config": {**settings(method, 8, False)}})
    weights = Weights({}, (), (), loaders)
    return PackedMatrix("x", scheme, (8, 8), 8, weights)


def test_words_that_are_known_from_the_wild() -> None:
    """AutoGPTQ's symmetric zero points read 2004318071; AutoAWQ's word of 0..7 is 0x75316420."""
    eight = np.arange(8)
    assert (words_of("gptq", "qweight", [0x76543210]).codes() == eight).all()
    assert (words_of("awq", "qweight", [0x75316420]).codes() == eight[:, None]).all()
    for method, word in (("gptq", 2004318071), ("gptq_v2", -2004318072)):
        assert (words_of(method, "qzeros", [word]).zeros() == 8).all()
    with pytest.raises(UnsupportedError, match="16 or for 0"):
        words_of("gptq", "qzeros", [-1]).zeros()


def test_symmetric_zero_points_can_only_be_the_middle(plain: Path, tmp_path: Path) -> None:
    """Some tools announce z - 1 and write z."""
    expected = write_packed(plain, tmp_path / "packed", "gptq_v2", symmetric=True)
    change(tmp_path / "packed", lambda found: found.update(checkpoint_format="gptq"))
    checkpoint = open_checkpoint(tmp_path / "packed")
    name = f"{Q_PROJ}.weight"
    assert torch.equal(checkpoint.read(name).double(), expected[name])
    write_packed(plain, tmp_path / "other", "gptq", symmetric=False)
    change(tmp_path / "other", lambda found: found.update(sym=True))
    with pytest.raises(InputError, match="not in the middle"):
        open_checkpoint(tmp_path / "other").read(name)


@pytest.mark.parametrize("broken", [None, {"weights": "int4"}, {"weights": None}])
def test_broken_settings_are_named(plain: Path, tmp_path: Path, broken: object) -> None:
    write_packed(plain, tmp_path / "packed", "compressed-tensors", symmetric=True)
    change(tmp_path / "packed", lambda found: found.update(config_groups={"group_0": broken}))
    with pytest.raises(InputError, match="does not describe weights"):
        open_checkpoint(tmp_path / "packed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types(plain: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    write_packed(plain, tmp_path / "packed", "compressed-tensors", symmetric=True)
    path = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(path)
    changed = {k: v.to(dtype) if k.endswith("weight_scale") else v for k, v in tensors.items()}
    save_file(changed, path, {"format": "pt"})
    matrix = open_checkpoint(tmp_path / "packed").packed[f"{Q_PROJ}.weight"]
    assert torch.equal(matrix.scales(), changed[f"{Q_PROJ}.weight_scale"].float())


def test_pickled_ones_are_read_where_pickles_are_allowed(plain: Path, tmp_path: Path) -> None:
    expected = write_packed(plain, tmp_path / "packed", "awq", symmetric=False)
    path = tmp_path / "packed" / "model.safetensors"
    torch.save(load_file(path), tmp_path / "packed" / "pytorch_model.bin")
    path.unlink()
    name = f"{Q_PROJ}.weight"
    found = open_checkpoint(tmp_path / "packed", allow_pickle=True).read(name)
    assert torch.equal(found.double(), expected[name])


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
        ("compressed-tensors", {"transform_config": {"config_groups": {"R1": {}}}}, "transform"),
        ("compressed-tensors", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq", {"group_size": "128"}, "group_size '128'"),
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
    with pytest.raises(UnsupportedError, match="input_activations"):
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
    with pytest.raises(InputError, match=r"g_idx is F16"):
        opening(g_idx=torch.zeros(64, dtype=torch.float16))
    with pytest.raises(InputError, match=r"integers .* are I32 \[0, 64\]"):
        opening(qweight=torch.zeros(0, 64, dtype=torch.int32))
    named = {k.replace("qweight", "weight"): v for k, v in whole.items()}
    save_file(named, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"no tensor is called \.\.\.qweight"):
        open_checkpoint(tmp_path / "packed")
