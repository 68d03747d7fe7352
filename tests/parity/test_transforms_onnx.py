"""A rotation at run time in an ONNX file, proved by the whole ladder of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.onnx import read_onnx
from exporters.onnx.names import MODEL
from pipeline.errors import UnsupportedError
from pipeline.progress import open_progress
from pipeline.reexport import reexport
from tests.deploying import deploy, gate_statuses
from tests.tiny import trained_checkpoint

CHAIN = ("permute:by=massdiff,spaces=inner", "online:block=32")


def test_every_gate_is_green_and_gguf_cannot_have_it(tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = {
        "target": "onnx",
        "type": "INT4_G32",
        "token_embedding_type": None,
        "transforms": CHAIN,
        "evaluation.chunks": 4,
    }
    report = deploy(trained_checkpoint("llama"), output, options)
    statuses = gate_statuses(report)
    assert {"transform", "census", "twin"} <= {level for level, _ in statuses}
    assert set(statuses.values()) == {"green"}
    with (
        open_progress("quiet") as progress,
        pytest.raises(UnsupportedError, match="cannot be exported to GGUF"),
    ):
        reexport(output, "gguf", output=tmp_path / "other", progress=progress)


def test_corrected_biases_are_taken_over(tmp_path: Path) -> None:
    options = {
        "target": "gguf,onnx",
        "type": "Q4_0",
        "transforms": ("rotate:spaces=values",),
        "quantization.bias_correction": True,
        "evaluation.chunks": 4,
        "runtime.llamacpp": "off",
        "gates.deployed_lnppl": 1.0,
        "gates.deployed_kld": 1.0,
    }
    output = tmp_path / "out"
    first = deploy(trained_checkpoint("llama"), output, options)
    assert "red" not in gate_statuses(first).values(), first.gates
    with open_progress("quiet") as progress:
        second = reexport(output, "onnx", output=tmp_path / "other", progress=progress)
    assert set(gate_statuses(second).values()) == {"green"}
    name = "model.layers.0.mlp.down_proj.bias"
    biases = [read_onnx(folder / MODEL).floats(name) for folder in (output, tmp_path / "other")]
    assert (biases[0] == biases[1]).all()
    assert biases[0].any()
