"""Another file format of a finished quantization: codes and scales are taken over, not solved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from exporters.gguf import SCALED_TYPES, gguf_name, unpack
from exporters.onnx import read_onnx
from pipeline.architectures.base import EMBEDDING, HEAD, is_gain
from pipeline.delivery import carry_out, enter
from pipeline.errors import UnsupportedError, VerificationError
from pipeline.identity import identity_of_run
from pipeline.order import Order
from pipeline.progress import Progress
from pipeline.quantization.formats import QuantizedTensor, get_format
from pipeline.recipe import Recipe, split_tensor_type
from pipeline.recipe_files import ResolvedRecipe, load_recipe
from pipeline.report import Report
from pipeline.run import check_original, prepare
from pipeline.run_directory import RunDirectory
from pipeline.stages.load import Source
from pipeline.stages.model_files import ModelFile, model_files
from pipeline.stages.plan import ONNX_TABLES, TypePlan
from pipeline.stages.quantize import BIAS, Part, QuantizedModel, part_by_part
from pipeline.stages.report import RECIPE, check_files
from pipeline.stages.stored import FLOAT_TYPES, StoredTensor
from pipeline.stages.transform import Delivered, transform
from pipeline.stages.tune import Tuned, was_tuned
from pipeline.stages.walk import store_free
from pipeline.storage import OUTPUT_MARKER
from pipeline.targets import GGUF_NAMES, check_held, parse_targets
from runtimes.gguf_weights import GGUFWeights

Read = Callable[[str], StoredTensor]
"""Gives a matrix of the finished file by its Hugging Face name."""


def reexport(
    folder: Path,
    target: str,
    *,
    output: Path,
    attention: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    allow_pickle: bool = False,
    command: str = "",
    progress: Progress,
) -> Report:
    """Write a finished quantization in another file format, and prove that file as `deploy` does.

    Decoder matrices must be of a type that both formats hold. A table that the target cannot hold
    is made anew from the checkpoint, as tables are quantized without data; that is counted as a
    type that was replaced.

    Args:
        folder: Output of `deploy`, or of this.
        target: File formats to write, see `pipeline.targets.parse_targets`.
        output: Folder to create.
        attention: Operators of ONNX graphs; None: as the recipe has it.
        model: Where the original checkpoint is now; by default where it was.
        overwrite: Replace an earlier output folder.
        fresh: Ignore what an interrupted export has finished.
        allow_pickle: Accept PyTorch pickles.
        command: The command line, for the model card.
        progress: Told what happens.

    Raises:
        InputError: The folder, its manifest or the original is missing or altered.
        UsageError: The recipe's types and the target do not go together.
        UnsupportedError: A matrix is of a type that the target cannot hold.
    """
    order = Order(output.resolve(), None, overwrite, fresh, command)
    order.check()
    manifest = check_files(folder)
    finished = load_recipe(file=folder / RECIPE).recipe
    resolved = _resolved(folder, finished, target, attention, model)
    revision = manifest["input"].get("revision") if model is None else None
    recipe = resolved.recipe.model_copy(update={"revision": revision})
    file = model_files(folder, manifest, finished)[0]
    source, texts = prepare(recipe, allow_pickle, progress, lambda s: _adapted(s, file, recipe))
    check_original(source, manifest)
    taken_from = hashlib.sha256((folder / OUTPUT_MARKER).read_bytes()).hexdigest()
    identity = identity_of_run(recipe, source, texts) | {"taken over from": taken_from}

    def matrices(run: RunDirectory) -> tuple[QuantizedModel, None]:
        enter(progress, "transform")
        rewritten = transform(recipe, source, texts.calibration, Delivered(folder), progress)
        enter(progress, "quantize")
        return _take_over(rewritten, file, run, manifest, progress), None

    given = ResolvedRecipe(recipe, resolved.origins)
    return carry_out(order, identity, given, source, texts, matrices, progress)


def _resolved(
    folder: Path, finished: Recipe, target: str, attention: str | None, model: str | None
) -> ResolvedRecipe:
    """The finished recipe for another target, without types of tables that it cannot hold."""
    try:
        wanted = parse_targets(target)
    except ValueError:
        wanted = target  # the recipe refuses it, and says why
    unset = ["emit=[]"]  # what calibration measured is not in the folder
    for key in ("token_embedding_type", "output_tensor_type"):
        kind = getattr(finished, key)
        if kind is not None and not _held(kind, wanted):
            unset.append(f"{key}=")
    if "onnx" in wanted:
        unset.append("pure=false")  # else tables that are made anew would be of the one type, too
    rules = [split_tensor_type(text) for text in finished.tensor_types]
    if "gguf" in wanted:
        rules = [(pattern, GGUF_NAMES.get(kind, kind)) for pattern, kind in rules]
    held = tuple(f"{pattern}={kind}" for pattern, kind in rules if _held(kind, wanted))
    kind = None if finished.budgeted else finished.weight_type
    if kind is not None and "gguf" in wanted:
        kind = GGUF_NAMES.get(kind, kind)
    options: dict[str, Any] = {"target": target, "type": kind, "onnx.attention": attention}
    options["tensor_types"] = held
    if model is not None:
        options["model"] = str(Path(model).resolve()) if Path(model).exists() else model
    return load_recipe(file=folder / RECIPE, overrides=unset, options=options)


def _held(kind: str, target: str) -> bool:
    try:
        check_held(kind, target)
    except ValueError:
        return False
    return True


def _adapted(source: Source, file: ModelFile, recipe: Recipe) -> Source:
    """The source with the types that the file has, where the targets hold them."""
    kinds = {name: file.type_of(name) for name in (*source.shapes, HEAD)}
    types, replaced = dict(source.plan.types), []
    for name in (*types, *({HEAD} - types.keys())):
        kind = kinds[name]
        if kind is None:  # a tied head
            types.pop(name, None)
            continue
        kind = GGUF_NAMES.get(kind, kind) if "gguf" in recipe.targets else kind
        if _held(kind, recipe.target):
            types[name] = kind
        elif name in (EMBEDDING, HEAD):
            if "onnx" in recipe.targets:
                types[name] = ONNX_TABLES[name == HEAD or kinds[HEAD] is None]
            replaced.append(f"{name}: {kind} -> {types[name]} (made anew from the checkpoint)")
        else:
            raise UnsupportedError(
                f"{name} is {kind}, which {recipe.target} cannot hold",
                why="its codes and scales are taken over as they are",
                fix="deploy with --target gguf,onnx, whose types both hold",
            )
    plan = TypePlan(types, tuple(replaced))
    return replace(source, plan=plan, file_type=plan.most(source.checkpoint.shapes))


def _take_over(
    source: Source,
    file: ModelFile,
    run: RunDirectory,
    manifest: Mapping[str, Any],
    progress: Progress,
) -> QuantizedModel:
    """Codes, scales and gains of the file, and tables that are made anew, in the run directory."""
    source = replace(source, tuned=was_tuned(manifest))
    with ExitStack() as stack:
        if file.target == "gguf":
            weights = GGUFWeights(file.path, source.checkpoint.config)
            stack.callback(weights.close)
            read: Read = lambda name: _from_gguf(weights, name)  # noqa: E731
            floats: Callable[[str], torch.Tensor] = weights.read
        else:
            onnx = read_onnx(file.path)
            read = lambda name: _from_onnx(onnx, name)  # noqa: E731
            floats = lambda name: torch.from_numpy(onnx.floats(name))  # noqa: E731

        def make(names: list[str]) -> Part:
            stored = {}
            for name in names:
                kind = source.plan.types[name]
                anew = file.type_of(name) not in (kind, *_other_names(kind))
                stored[name] = store_free(kind, source.read(name)) if anew else read(name)
                if not anew:
                    stored[name] = renamed(stored[name], kind)
            biases = [name.removesuffix("weight") + "bias" for name in names]
            held = {f"{BIAS}{name}": floats(name) for name in biases if name in source.shapes}
            return Part(stored, [], held)

        model = part_by_part(source, run, progress, make)
        gains = {name: floats(name) for name in source.shapes if is_gain(name)}
        tuned = manifest.get("tuning", {})
        notes = (Tuned(**tuned).summary(),) if tuned else ()
        return replace(model, gains=gains, tuned=tuned, notes=notes)


def _other_names(kind: str) -> list[str]:
    return [name for name, same in GGUF_NAMES.items() if same == kind]


def _from_gguf(weights: GGUFWeights, name: str) -> StoredTensor:
    """A matrix of a GGUF file, checked against the decoder that shares nothing with the packer."""
    kind, decoded = weights.type_of(gguf_name(name)), weights.read(name)
    if kind in FLOAT_TYPES:
        return StoredTensor(kind, decoded)
    scale = weights.tensor_scale(gguf_name(name)) if kind in SCALED_TYPES else None
    quantized = unpack(weights.rows(name), kind, decoded.shape[1], scale)
    if not torch.equal(quantized.dequantize(), decoded):
        raise VerificationError(f"codes and scales of {name} do not give its weights")
    return StoredTensor(kind, quantized)


def _from_onnx(file: Any, name: str) -> StoredTensor:
    kind = file.types[name]
    if kind in FLOAT_TYPES:
        return StoredTensor(kind, torch.from_numpy(file.floats(name)))
    return StoredTensor(kind, file.quantized(name))


def renamed(stored: StoredTensor, kind: str) -> StoredTensor:
    """The same matrix in a type that differs in name, or in the sign of codes and scales.

    Raises:
        VerificationError: The levels of the two are not the same.
    """
    content = stored.content
    if stored.type == kind or not isinstance(content, QuantizedTensor):
        return stored
    fmt, levels = get_format(kind), content.format.levels
    if fmt.levels == levels:
        return StoredTensor(kind, QuantizedTensor(fmt, content.codes, content.scales))
    if fmt.levels == tuple(-level for level in reversed(levels)):
        fields = {"d": -content.scales["d"]}
        return StoredTensor(kind, QuantizedTensor(fmt, -content.codes, fields))
    raise VerificationError(f"{stored.type} and {kind} have other levels")
