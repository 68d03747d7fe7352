"""Corrected biases: the means that they promise, and the files that hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exporters.gguf.reader import open_gguf
from pipeline.calibration.moments import Moments
from pipeline.errors import PipelineError, UnsupportedError, UsageError
from pipeline.quantization.layer import LayerOptions
from pipeline.recipe_files import load_recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.load import Source, open_source
from pipeline.stages.plan import TypePlan
from pipeline.stages.walk import SolvedSite, Walk, WalkSettings
from runtimes.torch_reference import TorchReference
from tests.deploying import deploy, digest_of_model, gate_statuses
from tests.tiny import make_checkpoint, trained_checkpoint

ON = {"quantization.bias_correction": True}
GENERATOR = torch.Generator().manual_seed(8)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def test_centred_moments_are_those_of_centred_inputs() -> None:
    Xq, X = 3 + gaussian(6, 5, 4), gaussian(6, 5, 4) - 1
    lost, share = 2 + gaussian(6, 5, 3), torch.rand(6, generator=GENERATOR).double()
    found = Moments(4, cross=True, mismatch=True, hidden=3, name="x")
    found.add(Xq[:2], X[:2], 0, share[:2], lost[:2])
    found.add(Xq[2:], X[2:], 2, share[2:], lost[2:])
    about = found.centred()
    blended = Xq + share[:, None, None] * (X - Xq)

    def centred(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)
        return flat - flat.mean(0)

    q = centred(Xq)
    torch.testing.assert_close(about.hessian, q.T @ q)
    assert about.cross is not None
    torch.testing.assert_close(about.cross, q.T @ centred(blended))
    assert about.residual is not None
    torch.testing.assert_close(about.residual, q.T @ centred(lost))
    assert about.mismatch is not None
    torch.testing.assert_close(about.mismatch, centred(X - Xq).T @ centred(X - Xq))
    torch.testing.assert_close(found.hessian, Xq.flatten(0, 1).T @ Xq.flatten(0, 1))
    both = found + found
    torch.testing.assert_close(both.centred().hessian, 2 * about.hessian)


def source_of(folder: Path, kind: str, *, corrected: bool) -> Source:
    options = {"model": str(folder), "type": "Q8_0", "quantization.bias_correction": corrected}
    source = open_source(load_recipe(options=options).recipe, allow_pickle=False)
    types = {n: kind if ".layers." in n else "Q8_0" for n in source.plan.types}
    return replace(source, plan=TypePlan(types, ()))


def walked(source: Source, *, corrected: bool, mismatch: float) -> tuple[Walk, list[SolvedSite]]:
    windows = torch.randint(512, (8, 32), generator=torch.Generator().manual_seed(1))
    settings = WalkSettings(LayerOptions(mismatch=mismatch), bias_correction=corrected)
    walk = Walk(source, source.read("model.embed_tokens.weight"), windows, settings)
    return walk, list(walk.solve(0))


@pytest.mark.parametrize("mismatch", [0.0, 1.0])
@pytest.mark.parametrize(("family", "sites"), [("qwen2", 1), ("llama", 4)])
def test_means_of_outputs_are_right(
    family: str, sites: int, mismatch: float, tmp_path: Path
) -> None:
    """Of every linear that has a bias, on the calibration tokens, in a model run from its weights.

    With one stream the mean is that of the float weights on the quantized model's inputs."""
    folder = make_checkpoint(tmp_path / "model", family, tie_word_embeddings=False)
    source = source_of(folder, "INT2_G32", corrected=True)
    _, solved = walked(source, corrected=True, mismatch=mismatch)
    assert sum(bool(site.biases) for site in solved) == sites
    windows = torch.randint(512, (8, 32), generator=torch.Generator().manual_seed(1))
    stored = {n: t.dequantize() for site in solved for n, t in site.stored.items()}
    biases = {n: b for site in solved for n, b in site.biases.items()}

    def read(name: str) -> Tensor:
        return biases.get(name, stored.get(name, source.read(name)))

    quantized, reference = (
        TorchReference(source.config, r, head=source.head) for r in (read, source.read)
    )
    inputs = [site_inputs(model, windows) for model in (quantized, reference)]
    for name, bias in biases.items():
        linear = name.removesuffix(".bias")
        site = source.checkpoint.architecture.site_of(linear.split(".", 3)[3]).name
        wanted = inputs[1 if mismatch else 0][site] @ source.read(f"{linear}.weight").T
        wanted = wanted + source.read(name)
        found = inputs[0][site] @ stored[f"{linear}.weight"].T + bias
        scale = wanted.std()
        assert ((found.mean((0, 1)) - wanted.mean((0, 1))).abs() < 1e-4 * scale).all(), name


@torch.no_grad()
def site_inputs(model: TorchReference, windows: Tensor) -> dict[str, Tensor]:
    block, residual = model.block(0), model.embed(windows)
    heads = block.heads(residual)
    after = block.add_attention(residual, heads)
    return {
        "qkv": block.site_input("qkv", residual),
        "o": heads,
        "gate_up": block.site_input("gate_up", after),
        "down": block.site_input("down", after),
    }


@pytest.mark.parametrize(
    ("family", "options", "error", "part"),
    [
        ("qwen3", {}, UnsupportedError, "qwen3 models have no biases"),
        ("llama", {"imatrix": "i.gguf"}, UsageError, "needs calibration"),
    ],
)
def test_where_it_cannot_be_had(
    family: str,
    options: dict[str, Any],
    error: type[PipelineError],
    part: str,
    tmp_path: Path,
) -> None:
    folder = make_checkpoint(tmp_path / "model", family)
    recipe = load_recipe(options={"model": str(folder), "type": "Q8_0", **ON, **options}).recipe
    with pytest.raises(error, match=part) as caught:
        open_source(recipe, allow_pickle=False)
    assert caught.value.fix


def test_added_biases_change_nothing_by_themselves(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    plain, biased = (source_of(folder, "Q8_0", corrected=c) for c in (False, True))
    tokens = torch.randint(512, (1, 20), generator=torch.Generator().manual_seed(1))
    old, new = (
        next(TorchReference(s.config, s.read, head=s.head).logits(tokens)) for s in (plain, biased)
    )
    torch.testing.assert_close(new, old)
    assert biased.checkpoint.num_parameters == plain.checkpoint.num_parameters
    assert len(biased.shapes) == len(plain.shapes) + 2 * 7
    assert "adds 14 biases" in biased.checkpoint.notes[-1]


def test_the_file_holds_them_and_every_gate_is_green(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"type": "Q2_0", "evaluation.chunks": 10, **ON}
    report = deploy(trained_checkpoint("llama"), tmp_path / "out", options)
    statuses = gate_statuses(report)
    assert "red" not in statuses.values(), report.gates
    assert statuses["deployed", "ggml emulator"] == "green"
    (path,) = (tmp_path / "out").glob("*.gguf")
    with open_gguf(path) as file:
        biases = [name for name in file.tensors if name.endswith(".bias")]
    assert len(biases) == 14
    store = RunDirectory.store

    def dying(self: RunDirectory, name: str, *args: Any) -> None:
        store(self, name, *args)
        if name == "block-0000":
            raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "store", dying)
        with pytest.raises(OSError, match="power cut"):
            deploy(trained_checkpoint("llama"), tmp_path / "again", options)
    deploy(trained_checkpoint("llama"), tmp_path / "again", options)
    assert digest_of_model(tmp_path / "again") == digest_of_model(tmp_path / "out")
