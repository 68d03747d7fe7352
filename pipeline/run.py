"""Run the stages in order, in a run directory, and publish a finished folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf import gguf_name
from pipeline import figures
from pipeline.errors import InputError, QualityGateError, VerificationError
from pipeline.identity import identity_of, identity_of_importance
from pipeline.order import Order
from pipeline.progress import Progress, memory_bytes
from pipeline.recipe import Recipe
from pipeline.recipe_files import ResolvedRecipe, load_recipe
from pipeline.report import Gate, Report
from pipeline.run_directory import RunDirectory
from pipeline.stages.calibrate import Texts, prepare_texts
from pipeline.stages.emit import emit
from pipeline.stages.export_onnx import check_onnx
from pipeline.stages.file_gates import check_tokenizer
from pipeline.stages.importance import importance_of, quantize_weighted
from pipeline.stages.load import Source, open_source
from pipeline.stages.model_files import (
    ModelFile,
    as_delivered,
    climb_all,
    describe,
    model_files,
    write_models,
)
from pipeline.stages.plan import TypePlan
from pipeline.stages.quantize import QuantizedModel, quantize
from pipeline.stages.repack import repack
from pipeline.stages.report import RECIPE, check_files, deliver
from pipeline.stages.transform import transform
from pipeline.stages.verify import Ladder, wants_llamacpp
from pipeline.storage import OUTPUT_MARKER, check_free_space, check_output, publish, scratch_folder
from pipeline.versions import versions

STAGES = ("load", "transform", "calibrate", "quantize", "export", "verify", "report")
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
    order = Order(output.resolve(), run_dir, overwrite, fresh, command)
    order.check()
    recipe = _with_absolute_paths(resolved.recipe)
    source, texts = prepare(recipe, allow_pickle, progress)
    resolved = replace(resolved, recipe=_of_checkpoint(recipe, source, progress))
    importance = importance_of(resolved.recipe, source)
    identity = identity_of(resolved.recipe, source, texts)
    identity |= identity_of_importance(importance)

    def matrices(run: RunDirectory) -> QuantizedModel:
        return _matrices(resolved.recipe, source, texts, importance, run, progress)

    return carry_out(order, identity, resolved, source, texts, matrices, progress)


def carry_out(
    order: Order,
    identity: Mapping[str, Any],
    resolved: ResolvedRecipe,
    source: Source,
    texts: Texts,
    matrices: Callable[[RunDirectory], QuantizedModel],
    progress: Progress,
) -> Report:
    """Make the matrices in a run directory, then export, verify and publish them.

    Args:
        order: Where to.
        identity: Everything that decides the matrices.
        resolved: The recipe.
        source: The checkpoint.
        texts: Evaluation text.
        matrices: Makes them; takes finished ones from the run directory.
        progress: Told what happens.

    Returns:
        See `deploy`.
    """
    output, overwrite = order.output, order.overwrite
    check_free_space(order.folder, BYTES_PER_PARAMETER * source.checkpoint.num_parameters)
    with RunDirectory(order.folder, identity, fresh=order.fresh, warn=progress.warning) as run:
        again = order.fresh or overwrite
        report = None if again else _delivered(output, identity, resolved.recipe)
        if report is None:
            check_output(output, overwrite=overwrite)
            _stage(progress, "quantize")
            model = matrices(run)
            try:
                with publish(output, overwrite=overwrite) as staging:
                    record = {"command": order.command, "identity": identity}
                    report = _finish(staging, model, resolved, texts, record, progress)
            except _RejectedError as rejected:
                return rejected.report
        else:
            progress.note(f"{output} is complete already: nothing was done again")
        if order.run_dir is None:
            run.delete()
    return replace(report, output=output)


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


def prepare(
    recipe: Recipe,
    allow_pickle: bool,
    progress: Progress,
    adapt: Callable[[Source], Source] = lambda source: source,
) -> tuple[Source, Texts]:
    """Everything before the expensive work, and every refusal that does not need it.

    Args:
        recipe: What to do.
        allow_pickle: Accept PyTorch pickles.
        progress: Told what happens.
        adapt: Changes the source as soon as it is open.
    """
    _stage(progress, "load")
    wants_llamacpp(recipe)
    source = adapt(open_source(recipe, allow_pickle=allow_pickle))
    check_onnx(source, recipe)
    for note in source.notes:
        progress.note(note)
    for replaced in source.plan.replaced:
        progress.warning(f"type replaced: {replaced}")
    _stage(progress, "transform")
    source = transform(recipe, source)
    _stage(progress, "calibrate")
    texts = prepare_texts(recipe, source)
    if "gguf" in recipe.targets:
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
    if source.checkpoint.packed:
        return repack(source, run, progress)
    if importance:
        return quantize_weighted(recipe, source, importance, run, progress)
    return quantize(recipe, source, texts.calibration, run, progress)


def _of_checkpoint(recipe: Recipe, source: Source, progress: Progress) -> Recipe:
    """The recipe with the type that follows from a checkpoint that is 4-bit already."""
    if source.packed_by is None or recipe.type == source.file_type:
        return recipe
    progress.warning(f"the checkpoint's zero points make it {source.file_type}, not {recipe.type}")
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
    record: dict[str, Any],
    progress: Progress,
) -> Report:
    """Export, verify and document into the folder that is about to be published."""
    recipe, source = resolved.recipe, model.source
    _stage(progress, "export")
    files = write_models(staging, model, recipe)
    emit(staging, model, recipe, texts)
    _stage(progress, "verify")
    ladder = climb_all(files, recipe, source, texts, staging, progress)
    counts = {**model.counts(), **texts.counts}
    _stage(progress, "report")
    report = _report(ladder, files, source, counts, progress)
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
    }
    return deliver(staging, report, resolved, record)


def plan(resolved: ResolvedRecipe, *, allow_pickle: bool = False) -> dict[str, tuple[str, int]]:
    """What a deploy would store: type and bytes of every tensor, by GGUF name.

    Raises:
        PipelineError: The checkpoint or the recipe is refused.
    """
    source = open_source(resolved.recipe, allow_pickle=allow_pickle)
    check_onnx(source, resolved.recipe)
    found = {}
    for name, shape in source.shapes.items():
        only = TypePlan({name: source.plan.types.get(name, "F32")}, ())
        size = only.size_bytes({name: shape}, packed=resolved.recipe.onnx.packed)
        found[gguf_name(name)] = (only.types[name], size)
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
    files = model_files(folder, manifest, recipe)
    source = as_delivered(source, files[0])
    with scratch_folder(folder) as scratch:
        ladder = climb_all(files, recipe, source, texts, scratch, progress)
    report = _report(ladder, files, source, manifest["report"]["counts"], progress)
    return replace(report, output=folder, notes=(*report.notes, *notes))


def _stage(progress: Progress, name: str) -> None:
    progress.stage(name, STAGES.index(name) + 1, len(STAGES))


def _deployed(gate: Gate) -> bool:
    return gate.level == "deployed" and gate.status == "green"


def _report(
    ladder: Ladder,
    files: list[ModelFile],
    source: Source,
    counts: Mapping[str, int],
    progress: Progress,
) -> Report:
    size = files[0].size_bytes
    others = (f"{f.path.name} takes {figures.size(f.size_bytes)} in all" for f in files[1:])
    notes = (*source.notes, *others)
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
