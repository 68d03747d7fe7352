"""The whole ladder behind transforms, and outliers that they undo, on trained weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from exporters.gguf.reader import open_gguf
from pipeline.progress import open_progress
from pipeline.stages.calibrate import prepare_texts
from pipeline.stages.transform import transform
from runtimes import llamacpp
from tests.benchmarks.transforms import (
    Nowhere,
    opened,
    perplexity,
    quantized_quality,
    with_types,
)
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


SPOILING = {
    "calibration.source": "stdlib",
    "calibration.samples": 16,
    "calibration.seqlen": 128,
    "evaluation.context": 256,
    "evaluation.chunks": 10,
    "type": "Q8_0",
    "device": "cpu",
    "quantization.rounding": "nearest",
    "quantization.scales": "absmax",
}
"""Round to nearest with the range as scale: the quantizer makes good nothing of what they do."""

RIGHT = (
    ("fold", "equalize:spaces=values+inner"),
    ("equalize:spaces=values+inner", "rotate:allow_untie=true"),
)
"""Folding takes back what was done behind norms, equalization what was done in between linears."""


def quantized(model: Path, kind: str, *transforms: str) -> tuple[float, float]:
    """Perplexities in full precision and quantized."""
    recipe, source = opened({**SPOILING, "model": str(model), "transforms": transforms}, "fast")
    texts = prepare_texts(recipe, source)
    with open_progress("quiet") as progress:
        source = with_types(source, kind)
        source = transform(recipe, source, texts.calibration, Nowhere(), progress)
    return perplexity(source, {}, texts, "cpu"), quantized_quality(recipe, source, texts)[0]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "INT3_G32"),
        *(
            pytest.param(family, kind, marks=pytest.mark.slow)
            for family in ("llama", "qwen2", "qwen3")
            for kind in ("INT3_G32", "INT4_G32")
            if (family, kind) != ("llama", "INT3_G32")
        ),
    ],
)
def test_nine_tenths_of_what_outliers_cost_are_won_back(
    family: str, kind: str, tmp_path: Path
) -> None:
    plain = trained_checkpoint(family)
    spoilt = inject(plain, tmp_path / "spoilt", channels=24)
    full, before = quantized(plain, kind)
    same, damaged = quantized(spoilt, kind)
    assert same == pytest.approx(full, rel=1e-6)  # the outliers are function-preserving
    print(f"{family} {kind}: {full:.2f}, {before:.2f}, with outliers {damaged:.2f}")  # noqa: T201
    assert damaged > 1.02 * before
    for transforms in RIGHT:
        same, healed = quantized(spoilt, kind, *transforms)
        assert same == pytest.approx(full, rel=1e-5)
        won = (damaged - healed) / (damaged - max(before, full))  # below it, luck
        print(f"{family} {kind} {transforms}: {healed:.2f}, {won:.0%} won back")  # noqa: T201
        assert won > 0.9
