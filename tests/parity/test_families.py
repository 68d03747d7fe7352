"""The whole ladder on every family and type, with trained weights: random models are chaotic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtimes import llamacpp
from tests.deploying import deploy, gate_statuses
from tests.tiny import trained_checkpoint

LEVELS = {"bytes", "tokens", "twin", "kernels", "deployed", "quality"}


def climb(family: str, kind: str, output: Path) -> None:
    options: dict[str, Any] = {"type": kind}
    if kind == "NVFP4":
        options["output_tensor_type"] = kind
    if (family, kind) == ("qwen2", "NVFP4"):  # whose graph has no scales for FFN tensors
        options["tensor_types"] = ("ffn=Q4_0",)
    report = deploy(trained_checkpoint(family), output, options)
    assert {level for level, _ in gate_statuses(report)} == LEVELS
    not_green = {k: v for k, v in gate_statuses(report).items() if v != "green"}
    allowed = set() if llamacpp.available() else {(level, "llama.cpp") for level in LEVELS}
    if kind == "Q2_0":
        allowed.add(("bytes", "gguf.quants"))  # newer than the package
    assert set(not_green) <= allowed, report.gates
    assert set(not_green.values()) <= {"not run"}
    assert report.exit_code == 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["verified"] is True
    worst = {"Q2_0": 1.5, "Q4_0": 0.1, "NVFP4": 0.1, "Q4_1": 0.1, "Q5_0": 0.05, "Q8_0": 0.01}[kind]
    assert report.qualities[0].d_ln_ppl < worst


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2", "qwen3"))]
)
def test_every_family_at_4_bits(family: str, tmp_path: Path) -> None:
    climb(family, "Q4_0", tmp_path / "out")


def test_two_bits(tmp_path: Path) -> None:
    climb("llama", "Q2_0", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q2_0", "Q4_1", "Q5_0", "Q8_0", "NVFP4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_family_and_type(family: str, kind: str, tmp_path: Path) -> None:
    climb(family, kind, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_0", "Q2_0", "Q8_0", "Q4_1", "Q5_0"])
def test_the_demo_model(kind: str, tmp_path: Path) -> None:
    report = deploy(None, tmp_path / "out", {"type": kind, "evaluation.context": 512})
    statuses = gate_statuses(report)
    assert "red" not in statuses.values(), report.gates
    assert statuses["deployed", "ggml emulator"] == "green"
