"""The whole ladder behind transforms, and outliers that they undo, on trained weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from exporters.gguf.reader import open_gguf
from runtimes import llamacpp
from tests.deploying import deploy, gate_statuses
from tests.outliers import inject
from tests.tiny import trained_checkpoint

LEVELS = {"transform", "bytes", "tokens", "twin", "kernels", "deployed", "quality"}
CHAINS = {
    "llama": (
        "permute:by=alike,spaces=inner+values+residual+heads",
        "equalize:method=awq,points=3",
    ),
    "qwen2": ("equalize:method=smoothquant", "permute", "rotate:allow_untie=true"),
    "qwen3": ("rotate:matrix=orthogonal,allow_untie=true", "permute:by=massdiff,spaces=inner"),
}


@pytest.mark.parametrize("family", CHAINS)
def test_every_gate_is_green(family: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = {"type": "Q4_0", "transforms": CHAINS[family]}
    report = deploy(trained_checkpoint(family), output, options)
    statuses = gate_statuses(report)
    assert {level for level, _ in statuses} == LEVELS
    allowed = set() if llamacpp.available() else {(level, "llama.cpp") for level in LEVELS}
    assert {k for k, v in statuses.items() if v != "green"} <= allowed, report.gates
    assert report.qualities[0].d_ln_ppl < 0.1
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["verified"] is True
    (path,) = output.glob("*.gguf")
    with open_gguf(path) as file:
        gains = [
            np.frombuffer(file.raw(name).tobytes(), np.float32)
            for name in file.tensors
            if name.endswith("norm.weight") and "_q_" not in name and "_k_" not in name
        ]
        untied = "output.weight" in file.tensors
    rotated = family != "llama"
    assert untied == rotated
    assert all((gain == 1).all() for gain in gains) == rotated
    assert (output / "transforms.safetensors").exists()


RIGHT = {
    "Q4_0": ("equalize:spaces=attention_norm+ffn_norm+values+inner",),
    "rotation": ("equalize:spaces=inner", "rotate:allow_untie=true"),
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_outliers_cost_little_where_they_are_undone(family: str, tmp_path: Path) -> None:
    """A hundredfold channel costs a large part of the quality at 4 bits; equalization, and rotation
    where it can reach, win at least nine tenths of it back."""
    plain = trained_checkpoint(family)
    spoilt = inject(plain, tmp_path / "spoilt", channels=3)

    def lost(model: Path, name: str, *transforms: str) -> float:
        options = {
            "type": "Q4_0",
            "transforms": transforms,
            "runtime.llamacpp": "off",
            "quantization.rounding": "nearest",
            "quantization.scales": "absmax",
            "quantization.refine_rounds": 0,
            "evaluation.chunks": 10,
            "gates.deployed_kld": 10.0,
            "gates.deployed_lnppl": 10.0,
        }
        report = deploy(model, tmp_path / name, options)
        assert report.exit_code == 0
        return report.qualities[0].ppl - report.qualities[0].reference_ppl

    before, damaged = lost(plain, "plain"), lost(spoilt, "damaged")
    print(f"{family}: {before:.3f} lost without outliers, {damaged:.3f} with them")  # noqa: T201
    assert damaged > 5 * before
    for name, transforms in RIGHT.items():
        healed = lost(spoilt, f"healed {name}", *transforms)
        print(f"{family}, {name}: {healed:.3f}")  # noqa: T201
        assert healed < 0.1 * damaged
