"""The model files of an output folder: one for each target, from one quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporters.gguf import gguf_name
from exporters.onnx.names import DATA
from pipeline.architectures.base import HEAD
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.report import Gate, Quality
from pipeline.stages.calibrate import Texts
from pipeline.stages.export import export
from pipeline.stages.export_onnx import export_onnx
from pipeline.stages.load import Source
from pipeline.stages.plan import TypePlan
from pipeline.stages.quantize import QuantizedModel
from pipeline.stages.verify import Ladder, climb
from pipeline.stages.verify_onnx import climb_onnx


@dataclass(frozen=True)
class ModelFile:
    """A model file that was written.

    Attributes:
        target: ``gguf`` or ``onnx``.
        path: The file; of ONNX the graph, whose weights lie beside it.
        promised: What each of its tensors must be.
    """

    target: str
    path: Path
    promised: Mapping[str, Any]

    def type_of(self, name: str) -> str | None:
        """Type of a matrix by its Hugging Face name; None if the file has no such tensor."""
        key = gguf_name(name) if self.target == "gguf" else name
        kind: str | None = self.promised[key]["type"] if key in self.promised else None
        return kind

    @property
    def size_bytes(self) -> int:
        """Size with all weights."""
        beside = self.path.with_name(DATA) if self.target == "onnx" else self.path
        parts = {self.path, beside}
        return sum(path.stat().st_size for path in parts if path.exists())


def write_models(folder: Path, model: QuantizedModel, recipe: Recipe) -> list[ModelFile]:
    """Write a file for each target of the recipe, the main one first."""
    written = []
    for target in recipe.targets:
        if target == "onnx":
            written.append(ModelFile(target, *export_onnx(folder, model, recipe)))
            continue
        kind = recipe.label if recipe.budgeted else model.source.file_type
        path = folder / f"{model.source.name}-{kind}.gguf"
        written.append(ModelFile(target, path, export(path, model, recipe)))
    return written


def climb_all(
    files: list[ModelFile],
    recipe: Recipe,
    source: Source,
    texts: Texts,
    scratch: Path,
    progress: Progress,
) -> Ladder:
    """The ladder of every file; with a red parity gate the next one is not climbed.

    Args:
        files: What `write_models` wrote.
        recipe: Limits of the gates.
        source: The full precision model.
        texts: Evaluation text.
        scratch: Folder for large temporary files.
        progress: A block is a model.
    """
    gates: list[Gate] = []
    qualities: list[Quality] = []
    climbers: dict[str, Callable[[ModelFile], Ladder]] = {
        "gguf": lambda f: climb(f.path, f.promised, recipe, source, texts, scratch, progress),
        "onnx": lambda f: climb_onnx(f.path, f.promised, recipe, source, texts, progress),
    }
    for file in files:
        ladder = climbers[file.target](file)
        gates += ladder.gates
        qualities += ladder.qualities
        if any(gate.status == "red" for gate in ladder.gates):
            break
    # Both climb from the same full precision and twin: rows of these would appear twice.
    return Ladder(tuple(gates), tuple(dict.fromkeys(qualities)))


def as_delivered(source: Source, file: ModelFile) -> Source:
    """The source with the types that a file has: what was taken over from another file may have
    tables of other types than the recipe's rules give."""
    types = {name: file.type_of(name) for name in (*source.plan.types, HEAD)}
    known = {name: kind for name, kind in types.items() if kind is not None}
    return replace(source, plan=TypePlan(known, source.plan.replaced))


def describe(files: list[ModelFile]) -> dict[str, Any]:
    """What the manifest says of the files; `model_files` reads it back."""
    main, *others = files
    return {
        "model_file": main.path.name,
        "tensors": main.promised,
        **{f.target: {"model_file": f.path.name, "tensors": f.promised} for f in others},
    }


def model_files(folder: Path, manifest: Mapping[str, Any], recipe: Recipe) -> list[ModelFile]:
    """The files that a manifest describes.

    Args:
        folder: The output folder.
        manifest: Its content, checked.
        recipe: As delivered.
    """
    main, *others = recipe.targets
    parts = [(main, manifest), *((target, manifest[target]) for target in others)]
    return [ModelFile(t, folder / part["model_file"], part["tensors"]) for t, part in parts]
