"""The output head: calibrated behind the last block where it is a matrix of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.architectures.base import HEAD
from pipeline.progress import open_progress
from pipeline.recipe import Recipe
from pipeline.recipe_files import load_recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages import walk
from pipeline.stages.load import Source, open_source
from pipeline.stages.quantize import QuantizedModel, quantize
from pipeline.stages.walk import store_free
from tests.tiny import make_checkpoint

WINDOWS = torch.randint(0, 512, (12, 32), generator=torch.Generator().manual_seed(0))
"""More tokens than inputs, so that H has full rank."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("head") / "m", "llama")


def opened(checkpoint: Path, **options: Any) -> tuple[Recipe, Source]:
    values = {"model": str(checkpoint), "type": "Q4_0", "pure": True, **options}
    recipe = load_recipe(options=values).recipe
    return recipe, open_source(recipe, allow_pickle=False)


def quantized(checkpoint: Path, folder: Path, **options: Any) -> QuantizedModel:
    recipe, source = opened(checkpoint, **options)
    with RunDirectory(folder, {"x": 1}) as run, open_progress("quiet") as progress:
        return quantize(recipe, source, WINDOWS, run, progress)


def head_inputs(checkpoint: Path, model: QuantizedModel) -> Tensor:
    """What transformers gives the head behind the quantized blocks, [tokens, hidden]."""
    library = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    library.load_state_dict({n: model.read(n) for n in model.source.shapes}, strict=False)
    with torch.no_grad():
        return library.model(WINDOWS).last_hidden_state.flatten(0, 1).double()


@pytest.mark.parametrize("kind", ["Q2_0", "Q4_0"])
def test_a_calibrated_head_loses_less_of_the_logits(
    kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    model = quantized(checkpoint, tmp_path / "run", output_tensor_type=kind)
    inputs = head_inputs(checkpoint, model)
    weight = model.source.read(HEAD)

    def lost(head: Tensor) -> float:
        return float((inputs @ (head - weight).double().T).square().sum())

    free = store_free(kind, weight).dequantize()
    assert lost(model.read(HEAD)) < 0.8 * lost(free)
    record = model.sites[-1]
    assert record["site"] == "head"
    energy = float((inputs @ weight.double().T).square().sum())
    assert record["loss"] == pytest.approx(lost(model.read(HEAD)) / energy, rel=0.05)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "F32"])
def test_wide_heads_are_stored_as_they_are(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    model = quantized(checkpoint, tmp_path / "run", output_tensor_type=kind)
    expected = store_free(kind, model.source.read(HEAD)).dequantize()
    assert torch.equal(model.read(HEAD), expected)
    assert {site["site"] for site in model.sites} == {"qkv", "o", "gate_up", "down"}


def test_rows_that_are_solved_apart_are_the_same_rows(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"quantization.refine_rounds": 0, "calibration.mismatch_estimate": "fixed"}
    whole = quantized(checkpoint, tmp_path / "a", **options)
    monkeypatch.setattr(walk, "HEAD_ROWS", 100)
    apart = quantized(checkpoint, tmp_path / "b", **options)
    assert torch.equal(whole.read(HEAD), apart.read(HEAD))
    assert whole.sites[-1]["loss"] == pytest.approx(apart.sites[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize("lost", ["head", "head and last block"])
def test_a_head_that_is_lost_is_solved_again_to_the_same_bytes(
    lost: str, checkpoint: Path, tmp_path: Path
) -> None:
    first = quantized(checkpoint, tmp_path / "run")
    expected, sites = first.read(HEAD), first.sites
    parts = tmp_path / "run" / "parts"
    names = ["head"] if lost == "head" else ["head", "block-0001"]
    for name in names:
        (path,) = parts.glob(f"{name}.*")
        path.write_bytes(path.read_bytes()[:-8])
    again = quantized(checkpoint, tmp_path / "run")
    assert torch.equal(again.read(HEAD), expected)
    assert again.sites == sites
