"""Run the stages in order, in a run directory, and publish a finished folder."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.gguf import gguf_name
from pipeline import __version__
from pipeline.errors import InputError, QualityGateError, UsageError, VerificationError
from pipeline.progress import Progress, memory_bytes
from pipeline.recipe import Recipe
from pipeline.recipe_files import ResolvedRecipe, load_recipe
from pipeline.report import Gate, Report
from pipeline.run_directory import RunDirectory
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
from pipeline.stages.transform import Delivered, keep_changes, transform
from pipeline.stages.verify import Ladder, climb, wants_llamacpp
from pipeline.storage import OUTPUT_MARKER, check_free_space, check_output, publish, scratch_folder

STAGES = ("load", "calibrate", "transform", "quantize", "export", "verify", "report")
BYTES_PER_PARAMETER = 6
"""Disk while a run lasts: codes and scales, the model file, and the float twin."""

VERSIONED = ("torch", "transformers", "numpy", "numba", "gguf", "tokenizers", "safetensors")


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
    check_free_space(folder, BYTES_PER_PARAMETER * source.checkpoint.num_parameters)
    importance = importance_of(resolved.recipe, source)
    identity = _identity(resolved.recipe, source, texts)
    identity |= _identity_of(importance)
    with RunDirectory(folder, identity, fresh=fresh, warn=progress.warning) as run:
        report = None if fresh or overwrite else _delivered(output, identity, resolved.recipe)
        if report is None:
            check_output(output, overwrite=overwrite)
            model = _matrices(resolved.recipe, source, texts, importance, run, progress)
            try:
                with publish(output, overwrite=overwrite) as staging:
                    record = {"command": command, "identity": identity}
                    report = _finish(staging, model, resolved, texts, record, progress)
            except _RejectedError as rejected:
                return rejected.report
        else:
            progress.note(f"{output} is complete already: nothing was done again")
        if run_dir is None:
            run.delete()
    return replace(report, output=output)


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
    """Rewritten and quantized here, or taken over from a checkpoint that is 4-bit already."""
    _stage(progress, "transform")
    source = transform(recipe, source, texts.calibration, run, progress)
    _stage(progress, "quantize")
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
    path = staging / f"{source.name}-{source.file_type}.gguf"
    promised = export(path, model, recipe)
    emit(staging, model, recipe, texts)
    keep_changes(staging, recipe, source)
    _stage(progress, "verify")
    ladder = climb(path, promised, recipe, source, texts, staging, progress)
    counts = {**model.counts(), **texts.counts}
    _stage(progress, "report")
    report = _report(ladder, path, source, counts, progress)
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
        **({"block_rotation_bounds": list(source.bounds)} if source.bounds else {}),
    }
    return deliver(staging, report, resolved, record)


def plan(resolved: ResolvedRecipe, *, allow_pickle: bool = False) -> dict[str, tuple[str, int]]:
    """What a deploy would store: type and bytes of every tensor, by GGUF name.

    Raises:
        PipelineError: The checkpoint or the recipe is refused.
    """
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
    source = open_source(recipe, allow_pickle=allow_pickle)
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
    _stage(progress, "transform")
    source = transform(recipe, source, texts.calibration, Delivered(folder), progress)
    _stage(progress, "verify")
    path = folder / manifest["model_file"]
    with scratch_folder(folder) as scratch:
        ladder = climb(path, manifest["tensors"], recipe, source, texts, scratch, progress)
    report = _report(ladder, path, source, manifest["report"]["counts"], progress)
    return replace(report, output=folder, notes=(*report.notes, *notes))


def versions() -> dict[str, str]:
    """Versions of everything that decides the bytes, and of llama-cpp-python if it is there."""
    found = {"piso-deploy": __version__, "python": platform.python_version()}
    for package in (*VERSIONED, "llama-cpp-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _stage(progress: Progress, name: str) -> None:
    progress.stage(name, STAGES.index(name) + 1, len(STAGES))


def _identity(recipe: Recipe, source: Source, texts: Texts) -> dict[str, Any]:
    """Everything that decides the bits of a block."""
    tokens = hashlib.sha256(texts.calibration.numpy().tobytes()).hexdigest()
    files = json.dumps(source.description["files"], sort_keys=True)
    decisive = {f"recipe.{k}": v for k, v in recipe.decisive().items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in decisive.items()}
    decided = {name: version for name, version in versions().items() if name != "llama-cpp-python"}
    return {
        **plain,
        **{f"version.{k}": v for k, v in decided.items()},
        "checkpoint": hashlib.sha256(files.encode()).hexdigest(),
        "calibration tokens": tokens,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _identity_of(importance: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The numbers of an importance matrix: its file may change between two runs."""
    if not importance:
        return {}
    digest = hashlib.sha256()
    for name, vector in sorted(importance.items()):
        digest.update(name.encode() + vector.tobytes())
    return {"importance": digest.hexdigest()}


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
    notes = (*source.checkpoint.notes, *source.vocabulary.notes, *source.rewrite_notes)
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
