"""The whole ladder behind transforms, and outliers that they undo, on trained weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from exporters.gguf.reader import open_gguf
from pipeline.progress import open_progress
from pipeline.recipe_files import load_recipe
from pipeline.stages.calibrate import prepare_texts
from pipeline.stages.transform import transform
from runtimes import llamacpp
from tests.benchmarks.transforms import (
    OPTIONS,
    ROWS,
    Nowhere,
    merged,
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


def test_figures_of_several_processes_become_one_table(tmp_path: Path) -> None:
    full = {"without | full precision": {"ppl": 50.0}}
    cell = {"ppl": 60.0, "kld": 0.25, "MB": 1.5}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    first = {**full, "without | R1 network | Q2_0": cell, "without | none | Q2_0": cell}
    second = {**full, "without | MagR 0.01 | INT5": {**cell, "ppl": 70.0}}
    for file, figures in zip(files, (first, second), strict=True):
        file.write_text(json.dumps(figures))
    assert merged(files).splitlines()[-3:] == [
        "| none | 60.00 | 0.2500 | 1.50 |  |  |  |",
        "| R1 network | 60.00 | 0.2500 | 1.50 |  |  |  |",
        "| MagR 0.01 |  |  |  | 70.00 | 0.2500 | 1.50 |",
    ]
    files[1].write_text(json.dumps({"without | full precision": {"ppl": 50.1}}))
    with pytest.raises(ValueError, match="full precision is 50"):
        merged(files)


def test_every_row_is_a_recipe() -> None:
    assert set(OPTIONS) < set(ROWS)
    for row, transforms in ROWS.items():
        recipe = load_recipe(options={"transforms": transforms, **OPTIONS.get(row, {})}).recipe
        assert len(recipe.transforms) == len(transforms)
