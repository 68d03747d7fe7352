"""The commands behind the command line: deploy, plan and verify."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from exporters.gguf import gguf_name
from pipeline.delivery import carry_out, check_disk, enter, report_of
from pipeline.errors import InputError
from pipeline.identity import identity_of_importance, identity_of_run
from pipeline.order import Order, run_folder
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.recipe_files import ResolvedRecipe, load_recipe
from pipeline.report import Report
from pipeline.run_directory import RunDirectory
from pipeline.stages.allocate import (
    Allocation,
    allocate,
    check_budget,
    delivered_types,
    with_types,
)
from pipeline.stages.calibrate import Texts, prepare_texts
from pipeline.stages.export_onnx import check_onnx
from pipeline.stages.file_gates import check_tokenizer
from pipeline.stages.importance import importance_of, quantize_weighted
from pipeline.stages.load import Source, open_source
from pipeline.stages.model_files import as_delivered, climb_all, model_files
from pipeline.stages.plan import TypePlan
from pipeline.stages.quantize import QuantizedModel, quantize
from pipeline.stages.repack import repack
from pipeline.stages.report import RECIPE, check_files
from pipeline.stages.transform import Delivered, transform
from pipeline.stages.tune import tune, was_tuned
from pipeline.stages.verify import wants_llamacpp
from pipeline.storage import scratch_folder


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
    identity = identity_of_run(resolved.recipe, source, texts)
    identity |= identity_of_importance(importance)

    def matrices(run: RunDirectory) -> tuple[QuantizedModel, Allocation | None]:
        enter(progress, "transform")
        rewritten = transform(resolved.recipe, source, texts.calibration, run, progress)
        typed, allocation = _allocated(resolved.recipe, rewritten, texts, run, progress)
        model = _matrices(resolved.recipe, typed, texts, importance, run, progress)
        enter(progress, "tune")
        return tune(resolved.recipe, model, texts, run, progress), allocation

    return carry_out(order, identity, resolved, source, texts, matrices, progress)


def _allocated(
    recipe: Recipe, source: Source, texts: Texts, run: RunDirectory, progress: Progress
) -> tuple[Source, Allocation | None]:
    """The source with the types that a budget buys, if there is one."""
    enter(progress, "allocate")
    if not recipe.budgeted:
        return source, None
    return allocate(source, recipe, texts.calibration, run, progress)


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
    enter(progress, "load")
    wants_llamacpp(recipe)
    source = adapt(open_source(recipe, allow_pickle=allow_pickle))
    check_onnx(source, recipe)
    for note in source.notes:
        progress.note(note)
    for replaced in source.plan.replaced:
        progress.warning(f"type replaced: {replaced}")
    if recipe.budgeted:
        check_budget(source, recipe)
    enter(progress, "calibrate")
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
    enter(progress, "quantize")
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
        folder = run_folder(output.resolve(), run_dir)
        recipe = _with_absolute_paths(resolved.recipe)
        source, texts = prepare(recipe, allow_pickle, progress)
        check_disk(folder, source, recipe)
        identity = identity_of_run(recipe, source, texts)
        with RunDirectory(folder, identity, fresh=fresh, warn=progress.warning) as run:
            enter(progress, "transform")
            source = transform(recipe, source, texts.calibration, run, progress)
            source, _ = _allocated(recipe, source, texts, run, progress)
        progress.note(f"measured in {folder}: deploy continues from there")
    else:
        source = open_source(resolved.recipe, allow_pickle=allow_pickle)
        check_onnx(source, resolved.recipe)
    found = {}
    for name, shape in source.shapes.items():
        only = TypePlan({name: source.plan.types.get(name, "F32")}, ())
        size = only.size_bytes({name: shape}, packed=resolved.recipe.onnx.packed)
        found[gguf_name(name)] = (only.types[name], size)
    return found


def check_original(source: Source, manifest: Mapping[str, Any]) -> None:
    """Compare a checkpoint's files with those that a manifest names.

    Raises:
        InputError: They are others.
    """
    if source.description["files"] != manifest["input"]["files"]:
        raise InputError(
            f"{source.checkpoint.source} is not the checkpoint that this folder was made from",
            why="the SHA-256 of its files differ from the manifest's",
            fix="give the original with --model",
        )


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
    enter(progress, "load")
    manifest = check_files(folder)
    recipe = load_recipe(file=folder / RECIPE).recipe
    revision = manifest["input"].get("revision")
    update = {"revision": revision} if model is None else {"model": model, "revision": None}
    recipe = recipe.model_copy(update=update)
    source = open_source(recipe, allow_pickle=allow_pickle)
    if recipe.budgeted:
        source = with_types(source, delivered_types(source, manifest["tensors"]))
    check_original(source, manifest)
    enter(progress, "calibrate")
    texts = prepare_texts(recipe, source)
    notes = []
    if texts.describe()["evaluation"]["sha256"] != manifest["texts"]["evaluation"]["sha256"]:
        notes.append("the evaluation text is not the one that the manifest's figures are from")
        progress.warning(notes[0])
    enter(progress, "transform")
    source = transform(recipe, source, texts.calibration, Delivered(folder), progress)
    enter(progress, "verify")
    files = model_files(folder, manifest, recipe)
    source = replace(as_delivered(source, files[0]), tuned=was_tuned(manifest))
    with scratch_folder(folder) as scratch:
        ladder = climb_all(files, recipe, source, texts, scratch, progress)
    report = report_of(ladder, files, source, manifest["report"]["counts"], progress)
    return replace(report, output=folder, notes=(*report.notes, *notes))
