"""Our files against llama-quantize's at the same types, in stock llama.cpp, in one run.

The rival gets the better of two files of each type: made with our own importance matrix (the mean
squared inputs on the same calibration text) and without one. All files are judged by
`pipeline.stages.compare` against the full precision model. *Share* is what is left of the rival's
excess perplexity over full precision; below 0.4 is this project's bar for the mixes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.gguf.imatrix import read_imatrix
from pipeline import run
from pipeline.errors import InputError
from pipeline.progress import Progress, open_progress
from pipeline.recipe_files import load_recipe
from pipeline.stages.compare import Compared, compare
from pipeline.stages.emit import IMATRIX
from pipeline.stages.export import export_twin
from pipeline.stages.load import open_source
from runtimes.llamacpp import quantize
from tests.benchmarks.stock_nvfp4 import write_nvfp4

STOCK_NAMES = {
    "IQ2_S": "IQ2_M",
    "MXFP4": "MXFP4_MOE",
    "Q3_K": "Q3_K_S",
    "Q4_K": "Q4_K_S",
    "Q5_K": "Q5_K_S",
}
"""What llama-quantize calls a mix that is made of a type, where no mix or another has its name."""

HEAD = "| type | MB | full precision | stock | ours | share | KLD stock | KLD ours |"


def measure(
    model: str | None,
    calibration: str | None,
    evaluation: str | None,
    folder: Path,
    types: Sequence[str],
    preset: str,
    *,
    pure: bool,
    settings: Mapping[str, Any],
) -> None:
    """Deploy each type, let llama.cpp quantize the same model, compare, print a row a type.

    Args:
        model: Checkpoint; None for the demo model.
        calibration: Text, for us and for the importance matrix.
        evaluation: Text that all files are judged on.
        folder: Where the files are kept.
        types: Types or mixes.
        preset: Of the recipe.
        pure: All matrices in the one type, embedding and head Q8_0; else llama-quantize's mixes.
        settings: Further recipe values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"pure": True, "token_embedding_type": "Q8_0", "output_tensor_type": "Q8_0"}
    shared = {
        "model": model,
        "calibration.source": calibration,
        "evaluation.source": evaluation,
        "emit": ("imatrix",),
        **(tables if pure else {}),
        **settings,
    }
    options = {key: value for key, value in shared.items() if value is not None}
    floating = folder / "full-precision.gguf"
    source = open_source(load_recipe(preset, options=options).recipe, allow_pickle=False)
    export_twin(floating, source.read, source)
    print(HEAD + "\n" + "| --- " * 8 + "|", flush=True)
    for kind in types:
        with open_progress() as progress:
            row = _one(kind, preset, options, tables if pure else {}, floating, progress)
        print(row, flush=True)


def _one(
    kind: str,
    preset: str,
    options: Mapping[str, Any],
    tables: Mapping[str, Any],
    floating: Path,
    progress: Progress,
) -> str:
    output = floating.parent / f"{preset}-{kind}{'-pure' if tables else ''}"
    recipe = load_recipe(preset, options={**options, "type": kind})
    begun = time.monotonic()
    report = run.deploy(recipe, output=output, progress=progress)
    seconds = time.monotonic() - begun
    if report.output is None:
        return f"| {kind} | delivered nothing: {report.to_json()} |"
    ours = next(path for path in output.glob("*.gguf") if path.name != IMATRIX)
    rivals = _rivals(kind, floating, output, tables, progress)
    text = options.get("evaluation.source")
    found = compare([floating, ours, *rivals], evaluation=text, progress=progress)
    best = min(found[2:], key=lambda one: one.comparison.candidate.ppl)
    progress.note(f"{kind}: deploy took {seconds:.0f} s")
    return _row(kind, found[1], best)


def _rivals(
    kind: str, floating: Path, output: Path, tables: Mapping[str, Any], progress: Progress
) -> list[Path]:
    """Stock files: with and without our importance matrix; of NVFP4, with and without scales of
    whole tensors."""
    if kind == "NVFP4" and tables:
        both = {True: output.with_name("stock-scaled.gguf"), False: output.with_name("stock.gguf")}
        for scaled, path in both.items():
            write_nvfp4(floating, path, scaled=scaled)
        return list(both.values())
    rivals = [floating.parent / f"{output.name}-stock{n}.gguf" for n in ("-imatrix", "")]
    vectors = (read_imatrix(output / IMATRIX), None)
    mix = STOCK_NAMES.get(kind, kind) if tables else kind
    for path, imatrix in zip(rivals, vectors, strict=True):
        try:
            quantize(floating, path, mix, imatrix=imatrix, **tables)
        except InputError as error:
            progress.note(f"{kind}: no stock file without an importance matrix ({error.what})")
    return [path for path in rivals if path.exists()]


def _row(kind: str, ours: Compared, stock: Compared) -> str:
    full = ours.comparison.reference.ppl
    excess = [one.comparison.candidate.ppl - full for one in (ours, stock)]
    sizes = {f"{one.size_bytes / 1e6:.2f}" for one in (ours, stock)}
    return (
        f"| {kind} | {' / '.join(sorted(sizes))} | {full:.2f} "
        f"| {stock.comparison.candidate.ppl:.2f} | {ours.comparison.candidate.ppl:.2f} "
        f"| {excess[0] / excess[1]:.2f} "
        f"| {stock.comparison.kld_mean:.4f} | {ours.comparison.kld_mean:.4f} |"
    )
