"""4-bit checkpoints of other tools become GGUF files without being quantized again."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import run
from pipeline.checkpoint import open_checkpoint
from pipeline.errors import UnsupportedError, UsageError
from pipeline.progress import open_progress
from runtimes.gguf_weights import GGUFWeights
from tests.deploying import deploy, gate_statuses
from tests.packed import write_packed
from tests.tiny import make_checkpoint, trained_checkpoint

OPTIONS = {"evaluation.chunks": 4, "gates.deployed_lnppl": 1.0}


@pytest.mark.parametrize(
    ("family", "method", "symmetric"),
    [
        ("llama", "gptq", True),
        ("llama", "awq", False),
        ("qwen3", "compressed-tensors", True),
        ("qwen2", "gptq_v2", False),
    ],
)
def test_the_file_holds_the_same_integers_and_scales(
    tmp_path: Path, family: str, method: str, symmetric: bool
) -> None:
    model = tmp_path / "packed"
    expected = write_packed(trained_checkpoint(family), model, method, symmetric=symmetric)
    report = deploy(model, tmp_path / "out", OPTIONS)
    assert report.exit_code == 0
    assert "red" not in gate_statuses(report).values()
    (path,) = (tmp_path / "out").glob("*.gguf")
    assert path.name.endswith("Q4_0.gguf" if symmetric else "Q4_1.gguf")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"decoder weights in {'Q4_0' if symmetric else 'Q4_1'}" in card
    assert f"{manifest['input']['packed']}, repacked]" in card
    assert "not its original" in card
    inexact = [s for s in manifest["sites"] if not s["exact"]]
    assert report.counts["matrices repacked inexactly"] == len(inexact)
    assert len(manifest["sites"]) == len(expected) == 2 * 7
    with closing(GGUFWeights(path, open_checkpoint(model).config)) as weights:
        for name, wanted in expected.items():
            difference = (weights.read(name).double() - wanted).abs().max()
            if symmetric:
                assert difference == 0, name
            else:
                # Only the offset is rounded, by half a unit in the last of fp16's 11 bits.
                assert difference <= 2**-11 * wanted.abs().max() * 2, name
    assert bool(inexact) != symmetric
    # All that differs from the reference is the embedding's rounding, and offsets'.
    (quality, *_) = [q for q in report.qualities if q.runtime == "torch twin"]
    assert abs(quality.d_ln_ppl) < 0.02


def test_what_would_quantize_twice_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "packed"
    write_packed(trained_checkpoint("llama"), model, "gptq", symmetric=True)
    for options in (
        {"type": "Q2_0"},
        {"tensor_types": ("ffn_down=Q8_0",)},
        {"emit": ("imatrix",)},
        {"target_bpw": 4.0},
    ):
        with pytest.raises(UsageError, match="4-bit already"):
            deploy(model, tmp_path / "out", {**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_groups_that_cut_through_blocks_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "packed"
    write_packed(trained_checkpoint("llama"), model, "gptq", symmetric=True, group=16)
    with pytest.raises(UnsupportedError, match="groups of 16"):
        deploy(model, tmp_path / "out", OPTIONS)


def test_matrices_that_were_left_alone_stay_in_half_precision(tmp_path: Path) -> None:
    source, model = trained_checkpoint("llama"), tmp_path / "packed"
    write_packed(source, model, "awq", symmetric=True)
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(model / "model.safetensors")
    for member in ("qweight", "qzeros", "scales"):
        tensors.pop(f"{name}.{member}")
    tensors[f"{name}.weight"] = load_file(source / "model.safetensors")[f"{name}.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    report = deploy(model, tmp_path / "out", {**OPTIONS, "runtime.llamacpp": "off"})
    assert report.exit_code == 0
    (path,) = (tmp_path / "out").glob("*.gguf")
    with closing(GGUFWeights(path, open_checkpoint(model).config)) as weights:
        kept = weights.read(f"{name}.weight")
        assert torch.equal(kept, tensors[f"{name}.weight"].half().float())


def test_a_packed_head_is_kept_too_and_the_folder_verifies(tmp_path: Path) -> None:
    plain, model = make_checkpoint(tmp_path / "plain", "llama"), tmp_path / "packed"
    expected = write_packed(plain, model, "gptq", symmetric=True, head=True)
    options = {**OPTIONS, "runtime.llamacpp": "off", "gates.deployed_kld": 1.0}
    assert deploy(model, tmp_path / "out", options).exit_code == 0
    (path,) = (tmp_path / "out").glob("*.gguf")
    with closing(GGUFWeights(path, open_checkpoint(model).config)) as weights:
        assert torch.equal(weights.read("lm_head.weight").double(), expected["lm_head.weight"])
    with open_progress("quiet") as progress:
        assert run.verify(tmp_path / "out", progress=progress).exit_code == 0
