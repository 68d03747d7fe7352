"""Make matrices in a run directory, export and prove them, and publish a finished folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import figures
from pipeline.errors import QualityGateError, VerificationError
from pipeline.order import Order
from pipeline.progress import Progress, memory_bytes
from pipeline.recipe import Recipe
from pipeline.recipe_files import ResolvedRecipe
from pipeline.report import Gate, Report
from pipeline.run_directory import RunDirectory
from pipeline.stages.allocate import Allocation, check_size, disk_bytes
from pipeline.stages.calibrate import Texts
from pipeline.stages.emit import emit
from pipeline.stages.load import Source
from pipeline.stages.model_files import ModelFile, climb_all, describe, write_models
from pipeline.stages.quantize import QuantizedModel
from pipeline.stages.report import check_files, deliver
from pipeline.stages.transform import keep_changes
from pipeline.stages.verify import Ladder
from pipeline.storage import OUTPUT_MARKER, check_free_space, check_output, publish
from pipeline.versions import versions

STAGES = (
    "load",
    "calibrate",
    "transform",
    "allocate",
    "quantize",
    "tune",
    "export",
    "verify",
    "report",
)
BYTES_PER_PARAMETER = 6
"""Disk while a run lasts: codes and scales, the model file, and the float twin."""

Matrices = Callable[[RunDirectory], tuple[QuantizedModel, Allocation | None]]
"""Makes the matrices of a run, taking finished ones from its directory; and how a budget chose
their types, if there is one."""


def enter(progress: Progress, stage: str) -> None:
    """Announce a stage of `STAGES`."""
    progress.stage(stage, STAGES.index(stage) + 1, len(STAGES))


class _RejectedError(Exception):
    """Leaves the publishing block of a file that failed verification."""

    def __init__(self, report: Report) -> None:
        super().__init__("a parity gate is red")
        self.report = report


def carry_out(
    order: Order,
    identity: Mapping[str, Any],
    resolved: ResolvedRecipe,
    source: Source,
    texts: Texts,
    matrices: Matrices,
    progress: Progress,
) -> Report:
    """Make the matrices in a run directory, then export, verify and publish them.

    Args:
        order: Where to.
        identity: Everything that decides the matrices.
        resolved: The recipe.
        source: The checkpoint.
        texts: Evaluation text.
        matrices: Makes them.
        progress: Told what happens.

    Returns:
        See `deploy`.
    """
    output, overwrite = order.output, order.overwrite
    check_disk(order.folder, source, resolved.recipe)
    with RunDirectory(order.folder, identity, fresh=order.fresh, warn=progress.warning) as run:
        again = order.fresh or overwrite
        report = None if again else _delivered(output, identity, resolved.recipe, texts)
        if report is None:
            check_output(output, overwrite=overwrite)
            model, allocation = matrices(run)
            try:
                with publish(output, overwrite=overwrite) as staging:
                    record = {"command": order.command, "identity": identity}
                    report = _finish(staging, model, resolved, texts, allocation, record, progress)
            except _RejectedError as rejected:
                return rejected.report
        else:
            progress.note(f"{output} is complete already: nothing was done again")
        if order.run_dir is None:
            run.delete()
    return replace(report, output=output)


def check_disk(folder: Path, source: Source, recipe: Recipe) -> None:
    """Refuse a disk that would be full before the end. Raises ResourceError."""
    measured = disk_bytes(source, recipe) if recipe.budgeted else 0
    check_free_space(folder, BYTES_PER_PARAMETER * source.checkpoint.num_parameters + measured)


def _delivered(
    output: Path, identity: Mapping[str, Any], recipe: Recipe, texts: Texts
) -> Report | None:
    """The report of an earlier run of the same command, if it has delivered already.

    A run may have been killed after it had published, before it could say so.
    """
    if not (output / OUTPUT_MARKER).is_file():
        return None
    manifest = check_files(output)
    ours = {"identity": identity, "recipe": recipe.flat(), "texts": texts.describe()}
    same = json.loads(json.dumps(ours))
    if any(manifest[key] != value for key, value in same.items()):
        return None
    return Report.from_dict(manifest["report"])


def _finish(
    staging: Path,
    model: QuantizedModel,
    resolved: ResolvedRecipe,
    texts: Texts,
    allocation: Allocation | None,
    record: dict[str, Any],
    progress: Progress,
) -> Report:
    """Export, verify and document into the folder that is about to be published."""
    recipe, source = resolved.recipe, model.source
    enter(progress, "export")
    files = write_models(staging, model, recipe)
    if allocation is not None:
        check_size(files[0].size_bytes, allocation)
        record |= {"allocation": allocation.record()}
    emit(staging, model, recipe, texts)
    keep_changes(staging, recipe, source)
    enter(progress, "verify")
    ladder = climb_all(files, recipe, source, texts, staging, progress)
    counts = {**model.counts(), **texts.counts}
    enter(progress, "report")
    report = report_of(ladder, files, source, counts, progress)
    summary = allocation.summary() if allocation is not None else ()
    report = replace(report, notes=(*report.notes, *summary, *model.notes))
    if report.exit_code == VerificationError.exit_code:
        raise _RejectedError(report)
    record |= {
        "input": source.description,
        "texts": texts.describe(),
        "versions": versions(),
        "recipe": resolved.recipe.flat(),
        "verified": report.exit_code != QualityGateError.exit_code,
        "verified_in": sorted({g.runtime for g in report.gates if _deployed(g)}),
        **describe(files),
        "sites": model.sites,
        **({"tuning": dict(model.tuned)} if model.tuned else {}),
        **({"block_rotation_bounds": list(source.bounds)} if source.bounds else {}),
    }
    return deliver(staging, report, resolved, record)


def _deployed(gate: Gate) -> bool:
    return gate.level == "deployed" and gate.status == "green"


def report_of(
    ladder: Ladder,
    files: list[ModelFile],
    source: Source,
    counts: Mapping[str, int],
    progress: Progress,
) -> Report:
    """The report of a ladder that was climbed.

    Args:
        ladder: Gates and qualities.
        files: The model files, the main one first.
        source: The checkpoint.
        counts: What was done differently from what was asked.
        progress: Has the timings.
    """
    size = files[0].size_bytes
    others = (f"{f.path.name} takes {figures.size(f.size_bytes)} in all" for f in files[1:])
    notes = (*source.notes, *source.rewrite_notes, *others)
    return Report(
        gates=(*source.exactness, *ladder.gates),
        qualities=ladder.qualities,
        bits_per_weight=8 * size / source.checkpoint.num_parameters,
        size_bytes=size,
        counts=dict(counts),
        notes=(*notes, *(f"type replaced: {r}" for r in source.plan.replaced)),
        timings=dict(progress.timings),
        memory_peak_bytes=memory_bytes()[1],
    )
