"""NVFP4 from the plan to the file: who may have it, and where the scales of whole tensors go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from exporters.gguf.reader import open_gguf
from pipeline import run
from pipeline.checkpoint import open_checkpoint
from pipeline.errors import UnsupportedError
from pipeline.progress import open_progress
from pipeline.quantization.layer import LayerOptions, quantize_free
from pipeline.quantization.tensor_scale import fit_tensor_scale, format_for
from pipeline.recipe_files import load_recipe
from pipeline.reexport import reexport
from pipeline.stages.export import file_sizes
from pipeline.stages.file_gates import bytes_gates
from pipeline.stages.load import Source, open_source
from pipeline.stages.measure import rounding
from pipeline.stages.plan import plan_types
from pipeline.stages.stored import StoredTensor
from pipeline.stages.walk import Walk, WalkSettings
from runtimes.gguf_weights import GGUFWeights
from tests.deploying import deploy
from tests.tiny import make_checkpoint, random_model, trained_checkpoint, write_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"
Q8_0_EMBEDDING = {"token_embedding_type": "Q8_0"}
QUICK = {"evaluation.chunks": 2, "runtime.llamacpp": "off", "gates.deployed_lnppl": 1.0}


def planned(folder: Path, **options: Any) -> dict[str, str]:
    recipe = load_recipe(options={"type": "NVFP4", "model": str(folder), **options}).recipe
    return plan_types(open_checkpoint(str(folder)), recipe).types


def opened(folder: Path, **options: Any) -> Source:
    recipe = load_recipe(options={"type": "NVFP4", "model": str(folder), **options}).recipe
    return open_source(recipe, allow_pickle=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose keys have 2^-6 of the size of its queries."""
    model = random_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(2.0**-6)
    return write_checkpoint(model, tmp_path_factory.mktemp("keys") / "m", "llama")


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("delivered") / "out"
    options = {**QUICK, "type": "NVFP4", "output_tensor_type": "NVFP4"}
    assert deploy(trained_checkpoint("llama"), output, options).exit_code == 0
    return output


def test_the_mix_has_it_in_all_linears_but_no_table(folder: Path, tmp_path: Path) -> None:
    types = planned(folder)
    assert (types.pop(EMBEDDING), types.pop(HEAD)) == ("IQ4_NL", "Q8_0")
    assert set(types.values()) == {"NVFP4"}
    tied = make_checkpoint(
        tmp_path, hidden_size=256, intermediate_size=512, tie_word_embeddings=True
    )
    assert planned(tied)[EMBEDDING] == "Q6_K"
    own = planned(tied, **Q8_0_EMBEDDING, output_tensor_type="NVFP4")
    assert (own[EMBEDDING], own[HEAD]) == ("Q8_0", "NVFP4")


def test_widths_of_32_are_replaced_by_as_many_bits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, hidden_size=96, intermediate_size=128, head_dim=24)
    with pytest.raises(UnsupportedError, match=r"NVFP4 -> IQ4_NL \(width 96\)"):
        planned(tmp_path)
    types = planned(tmp_path, allow_fallback=True)
    assert types[UP] == "IQ4_NL"
    assert types[UP.replace("up_proj", "down_proj")] == "NVFP4"


def test_tensors_whose_scale_llamacpp_would_not_use_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    for options in ({"pure": True}, {"token_embedding_type": "NVFP4"}):
        with pytest.raises(UnsupportedError, match=r"token_embd\.weight cannot be NVFP4") as caught:
            planned(folder, **options)
        assert "--token-embedding-type" in caught.value.fix
    assert set(planned(folder, pure=True, **Q8_0_EMBEDDING).values()) == {
        "NVFP4",
        "Q8_0",
    }
    tied = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight cannot be NVFP4"):
        planned(tied, output_tensor_type="NVFP4")
    qwen2 = make_checkpoint(tmp_path / "qwen2", "qwen2")
    with pytest.raises(
        UnsupportedError, match=r"blk\.0\.ffn_gate\.weight cannot be NVFP4"
    ) as caught:
        planned(qwen2)
    assert "qwen2 graph leaves the scales" in caught.value.why
    assert planned(qwen2, tensor_types=("ffn=Q4_0",))[UP] == "Q4_0"
    assert planned(make_checkpoint(tmp_path / "qwen3", "qwen3"))[UP] == "NVFP4"


def test_biases_of_the_ffn_are_refused_and_those_of_attention_are_not(
    folder: Path, tmp_path: Path
) -> None:
    biased = make_checkpoint(tmp_path / "mlp", mlp_bias=True)
    with pytest.raises(
        UnsupportedError, match=r"blk\.0\.ffn_gate\.weight cannot be NVFP4"
    ) as caught:
        planned(biased)
    assert "bias before it scales" in caught.value.why
    attention = make_checkpoint(tmp_path / "attention", attention_bias=True)
    assert planned(attention)[UP] == "NVFP4"
    with pytest.raises(UnsupportedError, match=r"ffn_gate\.weight cannot be NVFP4"):
        opened(folder, **{"quantization.bias_correction": True})


def test_the_run_directory_keeps_the_tensor_scale() -> None:
    W = 0.01 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    stored = StoredTensor("NVFP4", quantize_free(W, format_for("NVFP4", W), "piso"))
    other = StoredTensor("NVFP4", quantize_free(4 * W, format_for("NVFP4", 4 * W), "piso"))
    flat = load(save({**stored.flatten("a"), **other.flatten("b")}))
    again = StoredTensor.restore("a", "NVFP4", flat)
    assert again.tensor_scale == stored.tensor_scale == 2.0**-15
    assert StoredTensor.restore("b", "NVFP4", flat).tensor_scale == 2.0**-13
    assert torch.equal(again.dequantize(), stored.dequantize())
    assert again.content.format == stored.content.format
    plain = StoredTensor("Q4_0", quantize_free(W, format_for("Q4_0", W), "piso"))
    assert plain.tensor_scale is None
    assert set(plain.flatten("a")) == {"a:codes", "a:d"}


@torch.inference_mode()
def test_linears_that_are_solved_together_have_scales_of_their_own(folder: Path) -> None:
    source = opened(folder)
    tokens = torch.randint(0, 512, (4, 24), generator=torch.Generator().manual_seed(0))
    settings = WalkSettings(options=LayerOptions(), batch=2)
    walk = Walk(source, source.read(EMBEDDING), tokens, settings)
    solved = list(walk.solve(0))
    assert all(site.record["loss"] < 0.02 * len(site.stored) for site in solved)
    found = {n: t for site in solved for n, t in site.stored.items()}
    assert len(found) == 7
    for name, stored in found.items():
        weight = source.read(name)
        assert stored.tensor_scale == format_for("NVFP4", weight).tensor_scale
        assert fit_tensor_scale(stored.content.format, weight) == stored.content.format
    q, k = (found[f"model.layers.0.self_attn.{n}_proj.weight"].tensor_scale for n in "qk")
    assert q / k >= 32


def test_the_file_holds_what_the_manifest_says(delivered: Path) -> None:
    (path,) = delivered.glob("*.gguf")
    manifest = json.loads((delivered / "manifest.json").read_text())
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    scaled = {n: t for n, t in manifest["tensors"].items() if t["type"] == "NVFP4"}
    assert len(scaled) == 2 * 7 + 1
    assert len(tensors) == len(manifest["tensors"]) + len(scaled)
    for name, promise in scaled.items():
        scale = tensors[f"{name.removesuffix('weight')}scale"]
        assert scale.data.dtype == np.float32
        assert scale.data.tolist() == [promise["tensor_scale"]]
        assert np.frexp(scale.data[0])[0] == 0.5
    assert not any("tensor_scale" in t for t in manifest["tensors"].values() if t["type"] == "Q8_0")
    recipe = load_recipe(file=delivered / "recipe.toml").recipe
    source = open_source(recipe, allow_pickle=False)
    assert file_sizes(source, recipe).total(source.plan.types) == path.stat().st_size


@pytest.mark.parametrize("name", ["blk.1.ffn_up.scale", "output.scale"])
def test_a_scale_that_was_changed_turns_the_bytes_red(
    name: str, delivered: Path, tmp_path: Path
) -> None:
    (path,) = delivered.glob("*.gguf")
    manifest = json.loads((delivered / "manifest.json").read_text())
    source = open_source(load_recipe(file=delivered / "recipe.toml").recipe, allow_pickle=False)
    changed = Path(shutil.copy(path, tmp_path / "changed.gguf"))
    with open_gguf(path) as file:
        info = file.tensors[name]
    content = bytearray(changed.read_bytes())
    value = np.frombuffer(content[info.offset : info.offset + 4], "<f4")
    content[info.offset : info.offset + 4] = (2 * value).tobytes()
    changed.write_bytes(content)
    for tried, statuses in ((path, {"green"}), (changed, {"red"})):
        weights = GGUFWeights(tried, source.checkpoint.config)
        gates = bytes_gates(weights, manifest["tensors"], source)
        weights.close()
        assert {gate.status for gate in gates} == statuses
        details = {gate.detail for gate in gates}
        assert statuses == {"green"} or details == {f"differs: {name.replace('scale', 'weight')}"}


@pytest.mark.slow
def test_a_finished_quantization_verifies_and_is_taken_over_with_its_scales(
    delivered: Path, tmp_path: Path
) -> None:
    with open_progress("quiet") as progress:
        assert run.verify(delivered, progress=progress).exit_code == 0
        report = reexport(delivered, "gguf", output=tmp_path / "out", progress=progress)
    assert report.exit_code == 0
    first, second = (next(folder.glob("*.gguf")) for folder in (delivered, tmp_path / "out"))
    with open_gguf(first) as one, open_gguf(second) as two:
        assert list(one.tensors) == list(two.tensors)
        assert all(np.array_equal(one.raw(name), two.raw(name)) for name in one.tensors)


@pytest.mark.slow
def test_a_budget_counts_the_scales_of_pinned_tensors(tmp_path: Path) -> None:
    """`deploy` compares the file's size with the one that types were chosen for."""
    options = {**QUICK, "type": None, "token_embedding_type": None, "target_size": 260_000}
    options |= {"tensor_types": ("ffn_up=NVFP4", "attn_k=NVFP4")}
    report = deploy(trained_checkpoint("llama"), tmp_path / "out", options)
    assert report.exit_code == 0
    assert report.size_bytes <= 260_000
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    kinds = [t["type"] for t in manifest["tensors"].values()]
    assert kinds.count("NVFP4") == 4


def test_without_data_it_has_a_tensor_scale_too(folder: Path) -> None:
    key = "model.layers.1.self_attn.k_proj.weight"
    source = opened(folder)
    weight = source.read(key)
    recipe = load_recipe(options={"type": "NVFP4", "device": "cpu"}).recipe
    error = rounding(recipe, source)(key, weight) - weight
    assert error.square().sum() < 0.007 * weight.square().sum()
