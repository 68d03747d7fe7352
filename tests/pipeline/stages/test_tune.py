"""Tuned gains against autograd through the library's whole model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.calibration.streams import held_out_batches
from pipeline.demo import corpus
from pipeline.progress import open_progress
from pipeline.recipe import Recipe
from pipeline.recipe_files import load_recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages import tune as stage
from pipeline.stages.calibrate import Texts, prepare_texts
from pipeline.stages.load import open_source
from pipeline.stages.quantize import QuantizedModel, quantize
from pipeline.stages.tune import Tuned, Tuner, tune
from tests.tiny import FAMILIES, make_checkpoint, one_thread, trained_checkpoint

DRAW = torch.Generator().manual_seed(1)
TOKENS = torch.randint(0, 512, (12, 24), generator=DRAW)


def quantized(checkpoint: Path, folder: Path, **options: Any) -> tuple[Recipe, QuantizedModel]:
    values = {
        "model": str(checkpoint),
        "type": "Q2_0",
        "pure": True,
        "token_embedding_type": "Q8_0",
        "output_tensor_type": "Q8_0",
        "tuning.steps": 4,
        "device": "cpu",
        "calibration.batch": 4,
        **options,
    }
    recipe = load_recipe("fast", options=values).recipe
    source = open_source(recipe, allow_pickle=False)
    with RunDirectory(folder, {"x": 1}) as run, open_progress("quiet") as progress, one_thread():
        return recipe, quantize(recipe, source, TOKENS, run, progress)


def texts(windows: Tensor | None) -> Texts:
    return Texts(TOKENS, {}, (None, None), {}, windows)  # type: ignore[arg-type]


def library_model(checkpoint: Path, model: QuantizedModel | None = None) -> Any:
    found = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).double().eval()
    if model is not None:
        with torch.no_grad():
            for name, weight in found.named_parameters():
                weight.copy_(model.read(name))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd_through_the_whole_model(
    family: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", family)
    recipe, model = quantized(checkpoint, tmp_path / "run")
    tuner = Tuner(model, recipe, torch.device("cpu"))
    loss, gradients = tuner.loss_and_gradients(TOKENS[:3], tuner.last_streams(TOKENS[:3]))

    student, teacher = library_model(checkpoint, model), library_model(checkpoint)
    wanted = teacher(TOKENS[:3]).logits.log_softmax(-1).detach()
    found = student(TOKENS[:3]).logits.log_softmax(-1)
    expected = (wanted.exp() * (wanted - found)).sum(-1).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    gains = {n: p for n, p in student.named_parameters() if n.endswith("norm.weight")}
    assert gradients.keys() == gains.keys()
    assert len(gains) == (9 if family == "qwen3" else 5)
    slopes = torch.autograd.grad(expected, list(gains.values()))
    for name, slope in zip(gains, slopes, strict=True):
        error = (gradients[name] - slope).norm() / slope.norm()
        assert error < 2e-3, (name, float(error))
    with torch.no_grad():
        assert tuner.divergence(TOKENS[:3], tuner.last_streams(TOKENS[:3])) == pytest.approx(loss)


def test_put_changes_the_gains_of_blocks_that_are_in_memory_already(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "m", "llama")
    recipe, model = quantized(checkpoint, tmp_path / "run")
    tuner = Tuner(model, recipe, torch.device("cpu"))
    targets = tuner.last_streams(TOKENS[:2])
    tuner.divergence(TOKENS[:2], targets)
    doubled = {name: 2 * gain for name, gain in tuner.gains.items()}
    tuner.put(doubled)
    student, teacher = library_model(checkpoint, model), library_model(checkpoint)
    with torch.no_grad():
        for name, weight in student.named_parameters():
            if name in doubled:
                weight.copy_(doubled[name])
        wanted = teacher(TOKENS[:2]).logits.log_softmax(-1)
        found = student(TOKENS[:2]).logits.log_softmax(-1)
    expected = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert tuner.divergence(TOKENS[:2], targets) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, QuantizedModel, Tensor]:
    """A trained model at 2 bits, and windows of its language."""
    checkpoint = trained_checkpoint("llama")
    folder = tmp_path_factory.mktemp("tune")
    options = {"tuning.steps": 24, "tuning.batch": 2, "calibration.seqlen": 64}
    recipe, model = quantized(checkpoint, folder / "run", **options)
    recipe = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"source": "stdlib"})}
    )
    found = prepare_texts(recipe, open_source(recipe, allow_pickle=False)).tuning
    assert found is not None
    assert len(found) == 24 * 2 + 16
    return recipe, model, found


def fitted(recipe: Recipe, model: QuantizedModel, windows: Tensor) -> tuple[dict, Tuned]:
    with open_progress("quiet") as progress, one_thread():
        return Tuner(model, recipe, torch.device("cpu")).fit(windows[16:], windows[:16], progress)


def test_tuning_brings_a_model_closer_on_text_that_it_did_not_see(
    trained: tuple[Recipe, QuantizedModel, Tensor],
) -> None:
    recipe, model, windows = trained
    gains, tuned = fitted(recipe, model, windows)
    assert tuned.after < 0.98 * tuned.before
    assert tuned.kept > 0
    assert f"{tuned.kept} of 24 steps" in tuned.summary()
    moved = replace(model, gains=gains)
    student, teacher = (library_model(trained_checkpoint("llama"), m) for m in (moved, None))
    with torch.no_grad():
        wanted = teacher(windows[:16]).logits.log_softmax(-1)
        found = student(windows[:16]).logits.log_softmax(-1)
    expected = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert tuned.after == pytest.approx(expected, rel=1e-4)


def test_the_same_gains_come_out_when_blocks_are_read_in_every_step(
    trained: tuple[Recipe, QuantizedModel, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model, windows = trained
    few = recipe.model_copy(update={"tuning": recipe.tuning.model_copy(update={"steps": 3})})
    expected, _ = fitted(few, model, windows)
    assert expected
    monkeypatch.setattr(stage, "free_bytes", lambda device: 0)
    found, _ = fitted(few, model, windows)
    assert all(torch.equal(found[name], gain) for name, gain in expected.items())


def test_gains_stay_when_no_step_is_better_and_no_more_are_made(
    trained: tuple[Recipe, QuantizedModel, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, model, windows = trained
    seen: list[Tensor] = []
    plain = Tuner.loss_and_gradients

    def counted(self: Tuner, tokens: Tensor, targets: Tensor) -> Any:
        seen.append(tokens)
        return plain(self, tokens, targets)

    monkeypatch.setattr(Tuner, "loss_and_gradients", counted)
    wild = recipe.tuning.model_copy(update={"steps": 10, "rate": 50.0})
    gains, tuned = fitted(recipe.model_copy(update={"tuning": wild}), model, windows)
    assert gains == {}
    assert (tuned.kept, tuned.after) == (0, tuned.before)
    assert "none of 10 steps" in tuned.summary()
    assert len(seen) == 4  # two rounds of five


def test_steps_that_leave_the_range_of_numbers_are_not_kept(
    trained: tuple[Recipe, QuantizedModel, Tensor],
) -> None:
    recipe, model, windows = trained
    wild = recipe.tuning.model_copy(update={"steps": 4, "rate": 1e30})
    gains, tuned = fitted(recipe.model_copy(update={"tuning": wild}), model, windows)
    assert gains == {}
    assert tuned.kept == 0


def test_free_memory_is_the_least_that_the_system_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(stage, "CONTROL_GROUP", tmp_path)
    free = stage.free_bytes(cpu)
    assert free > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert stage.free_bytes(cpu) > 1000
    (tmp_path / "memory.max").write_text("1700\n")
    assert stage.free_bytes(cpu) == 1000
    (tmp_path / "memory.max").unlink()
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    assert stage.free_bytes(cpu) == 0


def windows_of(folder: Path, characters: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Calibration windows and tuning windows of a text of so many characters."""
    (folder / "text.txt").write_text(corpus("calibration", characters), encoding="utf-8")
    values = {
        "model": str(trained_checkpoint("llama")),
        "calibration.source": str(folder / "text.txt"),
        "evaluation.source": "stdlib",
        "calibration.samples": 40,
        "calibration.seqlen": 64,
        "calibration.batch": 4,
        "tuning.steps": 5,
        **options,
    }
    recipe = load_recipe("fast", options=values).recipe
    found = prepare_texts(recipe, open_source(recipe, allow_pickle=False))
    assert found.tuning is not None
    return found.calibration, found.tuning


def rows(windows: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in windows.tolist()}


def test_windows_for_tuning_are_of_text_that_solvers_did_not_see(tmp_path: Path) -> None:
    calibration, tuning = windows_of(tmp_path, 60_000)
    assert len(tuning) == 5 * 4 + 16
    assert not rows(calibration) & rows(tuning)


def test_a_short_text_gives_held_out_windows_and_then_those_that_solvers_saw(
    tmp_path: Path,
) -> None:
    calibration, tuning = windows_of(tmp_path, 3_000, **{"calibration.held_out": 0.1})
    assert 8 < len(calibration) < 36  # all that the text has
    assert rows(tuning) == rows(calibration)
    batches = -(-len(calibration) // 4)
    apart = held_out_batches(batches, 0.1)
    assert len(apart) == 1
    assert torch.equal(tuning[:4], calibration[4 * apart[0] :][:4])


def test_gains_of_other_steps_or_other_text_are_not_taken_over(
    trained: tuple[Recipe, QuantizedModel, Tensor], tmp_path: Path
) -> None:
    recipe, model, windows = trained
    name, few = "model.norm.weight", recipe.tuning.model_copy(update={"steps": 3})
    short = recipe.model_copy(update={"tuning": few})
    with RunDirectory(tmp_path / "run", {"x": 1}) as run, open_progress("quiet") as progress:
        first, other, text = (
            tune(asked, model, texts(part), run, progress).read(name)
            for asked, part in (
                (recipe, windows[:20]),
                (short, windows[:20]),
                (short, windows[:24]),
            )
        )
    assert not torch.equal(first, other)
    assert not torch.equal(other, text)


def test_finished_gains_are_taken_from_the_run_directory(
    trained: tuple[Recipe, QuantizedModel, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, model, windows = trained
    with RunDirectory(tmp_path / "run", {"x": 1}) as run, open_progress("quiet") as progress:
        first = tune(recipe, model, texts(windows[:20]), run, progress)
        monkeypatch.delattr(Tuner, "fit")
        again = tune(recipe, model, texts(windows[:20]), run, progress)
    name = "model.norm.weight"
    assert torch.equal(first.read(name), again.read(name))
    assert not torch.equal(first.read(name), model.read(name))
    assert first.tuned == again.tuned
    assert first.notes == again.notes


def test_what_is_not_tuned_says_so(
    trained: tuple[Recipe, QuantizedModel, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, model, windows = trained
    off = recipe.model_copy(update={"tuning": recipe.tuning.model_copy(update={"steps": 0})})
    given = recipe.model_copy(update={"imatrix": "other.gguf"})
    with RunDirectory(tmp_path / "run", {"x": 1}) as run, open_progress("plain") as progress:
        assert tune(off, model, texts(windows), run, progress) is model
        assert capsys.readouterr().err == ""
        for asked, text, why in (
            (given, windows, "importance matrix"),
            (recipe, windows[:1], "less than two windows"),
        ):
            (note,) = tune(asked, model, texts(text), run, progress).notes
            assert why in note
            assert note in capsys.readouterr().err
