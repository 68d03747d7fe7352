"""Each rung of the ONNX ladder must be able to turn red."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.onnx import read_onnx
from pipeline.progress import open_progress
from pipeline.recipe import Recipe
from pipeline.recipe_files import load_recipe
from pipeline.report import Gate
from pipeline.stages import verify_onnx
from pipeline.stages.calibrate import prepare_texts
from pipeline.stages.load import Source, open_source
from pipeline.stages.verify_onnx import climb_onnx, greedy_gate, prompts_of
from runtimes.onnxruntime import Census, OnnxRuntime
from runtimes.onnxruntime_speed import Speed
from tests.deploying import deploy, short_text
from tests.tiny import trained_checkpoint

OPTIONS = {
    "target": "onnx",
    "type": "INT4_G32",
    "evaluation.chunks": 2,
    "calibration.source": short_text(),
    "calibration.mismatch": 0.0,
    "quantization.refine_rounds": 0,
}
SPEED = Speed(1.0, 123.4, 56.7, 8_000_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("onnx") / "out"
    deploy(trained_checkpoint("llama"), output, OPTIONS)
    return output


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Nothing is timed here."""
    calls: list[dict[str, Any]] = []

    def measured(path: Path, **arguments: Any) -> Speed:
        calls.append(arguments)
        return SPEED

    monkeypatch.setattr(verify_onnx, "measure", measured)
    return calls


def climb(folder: Path, promised: dict[str, Any] | None = None) -> list[Gate]:
    recipe = load_recipe(file=folder / "recipe.toml").recipe
    source = open_source(recipe, allow_pickle=False)
    texts = prepare_texts(recipe, source)
    tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
    with open_progress("quiet") as progress:
        ladder = climb_onnx(
            folder / "model.onnx", promised or tensors, recipe, source, texts, progress
        )
    return list(ladder.gates)


def red(gates: list[Gate]) -> dict[str, Gate]:
    return {gate.level: gate for gate in gates if gate.status == "red"}


def test_bytes_other_than_the_solver_decided(folder: Path) -> None:
    tensors = json.loads((folder / "manifest.json").read_text())["tensors"]
    name = "model.layers.0.self_attn.q_proj.weight"
    for key in ("sha256_stored", "sha256_float32", "type"):
        other = tensors | {name: tensors[name] | {key: "Q4_0" if key == "type" else "0"}}
        gates = climb(folder, other)
        assert set(red(gates)) == {"bytes"}
        assert name in red(gates)["bytes"].detail
        assert "twin" not in {gate.level for gate in gates}
    missing = {key: value for key, value in tensors.items() if key != name}
    assert name in red(climb(folder, missing))["bytes"].detail


def test_a_tokenizer_that_is_not_the_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntime, "tokenize", lambda self, text: [1, 2, 3])
    assert "torture text" in red(climb(folder))["tokens"].detail


@pytest.mark.parametrize("census", [Census(14, 1, 1), Census(13, 2, 0), Census(15, 1, 0)])
def test_linears_that_were_not_fused(
    census: Census, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntime, "census", lambda self: census)
    gates = [gate for gate in climb(folder) if gate.level == "census"]
    assert [gate.status for gate in gates] == ["red", "red"]
    assert f"{census.dequantizers} DequantizeLinear" in gates[0].detail
    assert gates[0].limit == "15 fused, 0 DequantizeLinear"


def test_logits_that_are_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By 0.01 in one logit a window: too little for perplexity, too much for a logit."""
    logits = OnnxRuntime.logits

    def shifted(self: OnnxRuntime, tokens: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        for rows in logits(self, tokens, first):
            rows = rows.clone()
            rows[0, rows[0].argmin()] += 0.01
            yield rows

    monkeypatch.setattr(OnnxRuntime, "logits", shifted)
    twin = [gate for gate in climb(folder) if gate.level == "twin"]
    assert [gate.status for gate in twin] == ["green", "red"]
    assert twin[1].figure == pytest.approx(0.01, abs=1e-4)


def test_the_deployed_rung_reports_speed_and_memory(
    folder: Path, speed: list[dict[str, Any]]
) -> None:
    (gate,) = (gate for gate in climb(folder) if gate.level == "deployed")
    assert "123 prompt and 57 new tokens/s, 8 MB of memory" in gate.detail
    assert gate.limit == "report only"
    assert 1e-7 < gate.figure < 0.1  # type: ignore[operator]
    assert speed == [{"prompt": 128, "time_limit": 1800.0}]


class Scripted:
    """A runtime that continues every prompt with the same tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def greedy_batch(self, prompts: torch.Tensor, count: int) -> torch.Tensor:
        return torch.tensor([self.tokens[:count]] * len(prompts))


class Judge:
    """PyTorch whose best token is always 5, with 7 behind it by `margin`."""

    class config:  # noqa: N801
        max_position_embeddings = 12

    def __init__(self, margin: float) -> None:
        self.margin = margin

    def logits(self, tokens: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        for row in tokens:
            rows = torch.zeros(len(row) - 1 - first, 9)
            rows[:, 5], rows[:, 7] = 2.0, 2.0 - self.margin
            yield rows


@pytest.mark.parametrize(
    ("tokens", "margin", "status", "figure", "ties"),
    [
        ([5] * 8, 1.0, "green", "identical", 0),
        ([5, 5, 7, 5, 5, 5, 5, 5], 1e-4, "green", "identical", 3),
        ([5, 5, 7, 5, 5, 5, 5, 7], 2e-3, "red", "6 differ", 0),
        ([8] + [5] * 7, 1e-4, "red", "3 differ", 0),
    ],
)
def test_greedy_tokens_against_pytorch(
    tokens: list[int], margin: float, status: str, figure: str, ties: int
) -> None:
    """Three prompts of 4 tokens in a context of 12: 8 new ones each."""
    prompts = torch.zeros(3, 4, dtype=torch.int64)
    scripted: Any = Scripted(tokens)
    judge: Any = Judge(margin)
    gate = greedy_gate(scripted, judge, prompts, Recipe())
    assert (gate.status, gate.figure) == (status, figure)
    assert gate.claim.startswith("8 greedy tokens after each of 3 prompts")
    assert gate.detail == (f"{ties} ties within 0.001 went the other way" if ties else "")


@pytest.mark.parametrize(
    ("windows", "context", "length"), [(40, 512, 32), (3, 512, 32), (2, 80, 16), (1, 64, 1)]
)
def test_prompts_are_cut_from_the_evaluation_text(windows: int, context: int, length: int) -> None:
    tokens = torch.arange(windows * context).view(windows, context)
    prompts = prompts_of(tokens)
    assert prompts.shape == (20, length)
    for prompt in prompts:
        row, column = divmod(int(prompt[0]), context)
        assert torch.equal(prompt, tokens[row, column : column + length])
    assert len({tuple(p) for p in prompts.tolist()}) == 20


def test_weights_are_read_from_the_file(folder: Path) -> None:
    """Not from the checkpoint, whose matrices are other ones."""
    source: Source = open_source(
        load_recipe(file=folder / "recipe.toml").recipe, allow_pickle=False
    )
    file = read_onnx(folder / "model.onnx")
    read = verify_onnx._reader(file, source)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(read(name), file.quantized(name).dequantize())
    assert not torch.equal(read(name), source.read(name))
    assert torch.equal(read("model.norm.weight"), source.read("model.norm.weight"))
