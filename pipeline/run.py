"""Run the stages in order, in a run directory, and publish a finished folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf import gguf_name
from pipeline.errors import InputError, QualityGateError, UsageError, VerificationError
from pipeline.identity import identity_of_importance, identity_of_run, versions
from pipeline.progress import Progress, memory_bytes
from pipeline.recipe import Recipe
from pipeline.recipe_files import ResolvedRecipe, load_recipe
from pipeline.report import Gate, Report
from pipeline.run_directory import RunDirectory
from pipeline.stages.allocate import (
    Allocation,
    allocate,
    check_budget,
    check_size,
    delivered_types,
    disk_bytes,
    with_types,
)
from pipeline.stages.calibrate import Texts, prepare_texts
from pipeline.stages.emit import emit
from pipeline.stages.export import export
from pipeline.stages.file_gates import check_tokenizer
from pipeline.stages.importance import importance_of, quantize_weighted
from pipeline.stages.load import Source, open_source
from pipeline.stages.plan import TypePlan
from pipeline.stages.quantize import QuantizedModel, quantize
from pipeline.stages.repack import repack
from pipeline.stages.report import RECIPE, check_files, deliver
from pipeline.stages.transform import transform
from pipeline.stages.verify import Ladder, climb, wants_llamacpp
from pipeline.storage import OUTPUT_MARKER, check_free_space, check_output, publish, scratch_folder

STAGES = ("load", "transform", "calibrate", "allocate", "quantize", "export", "verify", "report")
BYTES_PER_PARAMETER = 6
"""Disk while a run lasts: codes and scales, the model file, and the float twin."""


class _RejectedError(Exception):
    """Leaves the publishing block of a file that failed verification."""

    def __init__(self, report: Report) -> None:
        super().__init__("a parity gate is red")
        self.report = report


def deploy(
    resolved: ResolvedRecipe,
    *,
    output: Path,
    run_dir: Path | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    allow_pickle: bool = False,
    command: str = "",
    progress: Progress,
) -> Report:
    """Quantize, export and prove a checkpoint.

    Args:
        resolved: What to do.
        output: Folder to create; it appears when it is complete and verified.
        run_dir: Where finished blocks are kept; beside `output` by default, and then removed
            after success.
        overwrite: Replace an earlier output folder.
        fresh: Ignore finished blocks.
        allow_pickle: Accept PyTorch pickles.
        command: The command line, for the model card.
        progress: Told what happens.

    Returns:
        The report, or that of the same command's earlier run if `output` is complete. Its
        `exit_code` is not 0 if a gate is red. With a red parity gate nothing is published
        (`output` is None); with a red quality gate the folder is, marked unverified.

    Raises:
        PipelineError: Anything that stops the run before its end.
    """
    output = output.resolve()
    folder = _run_folder(output, run_dir)
    if overwrite or not (output / OUTPUT_MARKER).is_file():
        check_output(output, overwrite=overwrite)
    recipe = _with_absolute_paths(resolved.recipe)
    source, texts = _prepare(recipe, allow_pickle, progress)
    resolved = replace(resolved, recipe=_of_checkpoint(recipe, source, progress))
    _check_disk(folder, source, recipe)
    importance = importance_of(resolved.recipe, source)
    identity = identity_of_run(resolved.recipe, source, texts)
    identity |= identity_of_importance(importance)
    with RunDirectory(folder, identity, fresh=fresh, warn=progress.warning) as run:
        report = None if fresh or overwrite else _delivered(output, identity, resolved.recipe)
        if report is None:
            check_output(output, overwrite=overwrite)
            source, allocation = _allocated(resolved.recipe, source, texts, run, progress)
            model = _matrices(resolved.recipe, source, texts, importance, run, progress)
            try:
                with publish(output, overwrite=overwrite) as staging:
                    record = {"command": command, "identity": identity}
                    report = _finish(staging, model, resolved, texts, allocation, record, progress)
            except _RejectedError as rejected:
                return rejected.report
        else:
            progress.note(f"{output} is complete already: nothing was done again")
        if run_dir is None:
            run.delete()
    return replace(report, output=output)


def _check_disk(folder: Path, source: Source, recipe: Recipe) -> None:
    """Refuse a disk that would be full before the end."""
    measured = disk_bytes(source, recipe) if recipe.budgeted else 0
    check_free_space(folder, BYTES_PER_PARAMETER * source.checkpoint.num_parameters + measured)


def _allocated(
    recipe: Recipe, source: Source, texts: Texts, run: RunDirectory, progress: Progress
) -> tuple[Source, Allocation | None]:
    """The source with the types that a budget buys, if there is one."""
    _stage(progress, "allocate")
    if not recipe.budgeted:
        return source, None
    return allocate(source, recipe, texts.calibration, run, progress)


def _run_folder(output: Path, run_dir: Path | None) -> Path:
    """Where finished blocks are kept; never a place that delivering would touch."""
    if not output.name:
        raise UsageError(f"the output {output} has no name", fix="give a folder: --output DIR")
    folder = output.with_name(f"{output.name}.piso-run") if run_dir is None else run_dir.resolve()
    if folder == output or output in folder.parents or folder in output.parents:
        raise UsageError(
            f"run directory {folder} and output {output} overlap",
            fix="choose a --run-dir apart from the output",
        )
    return folder


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with local paths made absolute, so that `verify` works from anywhere."""

    def absolute(name: str | None) -> str | None:
        return str(Path(name).resolve()) if name and Path(name).exists() else name

    calibration = {"source": absolute(recipe.calibration.source)}
    evaluation = {"source": absolute(recipe.evaluation.source)}
    return recipe.model_copy(
        update={
            "model": absolute(recipe.model),
            "imatrix": absolute(recipe.imatrix),
            "calibration": recipe.calibration.model_copy(update=calibration),
            "evaluation": recipe.evaluation.model_copy(update=evaluation),
        }
    )


def _prepare(recipe: Recipe, allow_pickle: bool, progress: Progress) -> tuple[Source, Texts]:
    """Everything before the expensive work, and every refusal that does not need it."""
    _stage(progress, "load")
    wants_llamacpp(recipe)
    source = open_source(recipe, allow_pickle=allow_pickle)
    for note in (*source.checkpoint.notes, *source.vocabulary.notes):
        progress.note(note)
    for replaced in source.plan.replaced:
        progress.warning(f"type replaced: {replaced}")
    _stage(progress, "transform")
    source = transform(recipe, source)
    if recipe.budgeted:
        check_budget(source, recipe)
    _stage(progress, "calibrate")
    texts = prepare_texts(recipe, source)
    check_tokenizer(source, texts.sources[1].text)
    for warning in texts.warnings():
        progress.warning(warning)
    return source, texts


def _matrices(
    recipe: Recipe,
    source: Source,
    texts: Texts,
    importance: dict[str, np.ndarray],
    run: RunDirectory,
    progress: Progress,
) -> QuantizedModel:
    """Quantized here, or taken over from a checkpoint that is 4-bit already."""
    _stage(progress, "quantize")
    if source.checkpoint.packed:
        return repack(source, run, progress)
    if importance:
        return quantize_weighted(recipe, source, importance, run, progress)
    return quantize(recipe, source, texts.calibration, run, progress)


def _of_checkpoint(recipe: Recipe, source: Source, progress: Progress) -> Recipe:
    """The recipe with the type that follows from a checkpoint that is 4-bit already."""
    if source.packed_by is None or recipe.weight_type == source.file_type:
        return recipe
    wanted = recipe.weight_type
    progress.warning(f"the checkpoint's zero points make it {source.file_type}, not {wanted}")
    return recipe.model_copy(update={"type": source.file_type})


def _delivered(output: Path, identity: Mapping[str, Any], recipe: Recipe) -> Report | None:
    """The report of an earlier run of the same command, if it has delivered already.

    A run may have been killed after it had published, before it could say so.
    """
    if not (output / OUTPUT_MARKER).is_file():
        return None
    manifest = check_files(output)
    same = json.loads(json.dumps({"identity": identity, "recipe": recipe.flat()}))
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
    _stage(progress, "export")
    kind = recipe.label if recipe.budgeted else source.file_type
    path = staging / f"{source.name}-{kind}.gguf"
    promised = export(path, model, recipe)
    if allocation is not None:
        check_size(path.stat().st_size, allocation)
        record |= {"allocation": allocation.record()}
    emit(staging, model, recipe, texts)
    _stage(progress, "verify")
    ladder = climb(path, promised, recipe, source, texts, staging, progress)
    counts = {**model.counts(), **texts.counts}
    _stage(progress, "report")
    report = _report(ladder, path, source, counts, progress)
    if allocation is not None:
        report = replace(report, notes=(*report.notes, *allocation.summary()))
    if report.exit_code == VerificationError.exit_code:
        raise _RejectedError(report)
    record |= {
        "input": source.description,
        "texts": texts.describe(),
        "versions": versions(),
        "recipe": resolved.recipe.flat(),
        "verified": report.exit_code != QualityGateError.exit_code,
        "verified_in": sorted({g.runtime for g in report.gates if _deployed(g)}),
        "tensors": promised,
        "sites": model.sites,
    }
    return deliver(staging, report, resolved, record)


def plan(
    resolved: ResolvedRecipe,
    *,
    output: Path,
    run_dir: Path | None = None,
    fresh: bool = False,
    allow_pickle: bool = False,
    progress: Progress,
) -> dict[str, tuple[str, int]]:
    """What a deploy would store: type and bytes of every tensor, by GGUF name.

    Under a budget this measures, in the run directory that `deploy` would use: it continues from
    there. Otherwise nothing is written.

    Args:
        resolved: What would be done.
        output: Where `deploy` would deliver.
        run_dir: As for `deploy`.
        fresh: As for `deploy`.
        allow_pickle: Accept PyTorch pickles.
        progress: Told what happens under a budget.

    Raises:
        PipelineError: The checkpoint or the recipe is refused.
    """
    if resolved.recipe.budgeted:
        folder = _run_folder(output.resolve(), run_dir)
        recipe = _with_absolute_paths(resolved.recipe)
        source, texts = _prepare(recipe, allow_pickle, progress)
        _check_disk(folder, source, recipe)
        identity = identity_of_run(recipe, source, texts)
        with RunDirectory(folder, identity, fresh=fresh, warn=progress.warning) as run:
            source, _ = _allocated(recipe, source, texts, run, progress)
        progress.note(f"measured in {folder}: deploy continues from there")
    else:
        source = open_source(resolved.recipe, allow_pickle=allow_pickle)
    found = {}
    for name, shape in source.shapes.items():
        only = TypePlan({name: source.plan.types.get(name, "F32")}, ())
        found[gguf_name(name)] = (only.types[name], only.size_bytes({name: shape}))
    return found


def verify(
    folder: Path, *, model: str | None = None, allow_pickle: bool = False, progress: Progress
) -> Report:
    """Check an output folder's hashes and climb the parity ladder again.

    Args:
        folder: Output of `deploy`.
        model: Where the original checkpoint is now; by default where it was.
        allow_pickle: Accept PyTorch pickles.
        progress: Told what happens.

    Raises:
        InputError: The folder, its manifest or the original is missing or altered.
    """
    _stage(progress, "load")
    manifest = check_files(folder)
    recipe = load_recipe(file=folder / RECIPE).recipe
    revision = manifest["input"].get("revision")
    update = {"revision": revision} if model is None else {"model": model, "revision": None}
    recipe = recipe.model_copy(update=update)
    source = transform(recipe, open_source(recipe, allow_pickle=allow_pickle))
    if recipe.budgeted:
        source = with_types(source, delivered_types(source, manifest["tensors"]))
    if source.description["files"] != manifest["input"]["files"]:
        raise InputError(
            f"{source.checkpoint.source} is not the checkpoint that this folder was made from",
            why="the SHA-256 of its files differ from the manifest's",
            fix="give the original with --model",
        )
    _stage(progress, "calibrate")
    texts = prepare_texts(recipe, source)
    notes = []
    if texts.describe()["evaluation"]["sha256"] != manifest["texts"]["evaluation"]["sha256"]:
        notes.append("the evaluation text is not the one that the manifest's figures are from")
        progress.warning(notes[0])
    _stage(progress, "verify")
    path = folder / manifest["model_file"]
    with scratch_folder(folder) as scratch:
        ladder = climb(path, manifest["tensors"], recipe, source, texts, scratch, progress)
    report = _report(ladder, path, source, manifest["report"]["counts"], progress)
    return replace(report, output=folder, notes=(*report.notes, *notes))


def _stage(progress: Progress, name: str) -> None:
    progress.stage(name, STAGES.index(name) + 1, len(STAGES))


def _deployed(gate: Gate) -> bool:
    return gate.level == "deployed" and gate.status == "green"


def _report(
    ladder: Ladder,
    path: Path,
    source: Source,
    counts: Mapping[str, int],
    progress: Progress,
) -> Report:
    size = path.stat().st_size
    notes = (*source.checkpoint.notes, *source.vocabulary.notes)
    return Report(
        gates=ladder.gates,
        qualities=ladder.qualities,
        bits_per_weight=8 * size / source.checkpoint.num_parameters,
        size_bytes=size,
        counts=dict(counts),
        notes=(*notes, *(f"type replaced: {r}" for r in source.plan.replaced)),
        timings=dict(progress.timings),
        memory_peak_bytes=memory_bytes()[1],
    )
