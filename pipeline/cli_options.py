"""Options that several commands share, declared once.

`takes_recipe` gives a command the options that choose a recipe: they are the parameters of
`recipe_options`, spliced into the command's own signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from pipeline.errors import UsageError

if TYPE_CHECKING:
    from pipeline.recipe_files import ResolvedRecipe

_RECIPE, _TEXT, _TYPES = "Recipe", "Calibration and evaluation", "Types"


def _option(flag: str, metavar: str, text: str, panel: str | None = None) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=panel)


def _switch(flag: str, text: str, panel: str | None = None) -> Any:
    return typer.Option(flag, help=text, rich_help_panel=panel)


_TEXT_HELP = "Text file or hub data set."

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Folder or hub id; without it, the demo model."),
]
Revision = Annotated[str | None, _option("--revision", "REV", "Branch, tag or commit on the hub.")]
Preset = Annotated[str, _option("--preset", "P", "fast, balanced or best.", _RECIPE)]
RecipeFile = Annotated[
    Path | None, _option("--recipe", "FILE", "TOML recipe, over the preset.", _RECIPE)
]
Overrides = Annotated[
    list[str] | None, _option("--set", "KEY=VALUE", "Any key of the recipe; repeatable.", _RECIPE)
]
Target = Annotated[
    str | None, _option("--target", "FORMAT", "File format: gguf, onnx, or gguf,onnx.", _TYPES)
]
WeightType = Annotated[
    str | None, _option("--type", "T", "Of the weights: Q4_0, Q2_K, Q4_K_M, ...", _TYPES)
]
TargetSize = Annotated[
    str | None,
    _option("--target-size", "SIZE", "Most bytes of the file, in place of a type: 15MB.", _TYPES),
]
TargetBpw = Annotated[
    float | None,
    _option("--target-bpw", "BITS", "The same, in bits of the file a parameter.", _TYPES),
]
Bits = Annotated[
    int | None, _option("--bits", "N", "In place of --type: 2, 3, 4 or 8 bits.", _TYPES)
]
GroupSize = Annotated[
    int | None, _option("--group-size", "N", "Likewise: inputs that share a scale.", _TYPES)
]
Symmetric = Annotated[
    bool | None,
    typer.Option(
        "--symmetric/--asymmetric",
        help="Likewise: levels around 0, or a zero point a group.",
        rich_help_panel=_TYPES,
    ),
]
Attention = Annotated[
    str | None,
    _option("--attention", "KIND", "Of ONNX graphs: standard, primitive or gqa.", _TYPES),
]
Pure = Annotated[bool, _switch("--pure", "All matrices in the one type, no mix.", _TYPES)]
TensorTypes = Annotated[
    list[str] | None,
    _option("--tensor-type", "REGEX=T", "By GGUF name; repeatable.", _TYPES),
]
EmbeddingType = Annotated[
    str | None, _option("--token-embedding-type", "T", "Of the token embedding.", _TYPES)
]
OutputType = Annotated[
    str | None, _option("--output-tensor-type", "T", "Of the output head.", _TYPES)
]
AllowFallback = Annotated[
    bool,
    _switch("--allow-fallback", "Replace types where a width does not divide.", _TYPES),
]
Imatrix = Annotated[
    str | None,
    _option("--imatrix", "FILE", "Importance matrix in place of calibration.", _TEXT),
]
Emit = Annotated[
    list[str] | None,
    _option("--emit", "WHAT", "Also write imatrix or kld-base; repeatable.", _TYPES),
]
Transforms = Annotated[
    list[str] | None,
    _option("--transform", "KIND:...", "Function-preserving rewrite; repeatable.", _TYPES),
]
Calibration = Annotated[str | None, _option("--calibration", "TEXT", _TEXT_HELP, _TEXT)]
Evaluation = Annotated[str | None, _option("--evaluation", "TEXT", _TEXT_HELP, _TEXT)]
Samples = Annotated[int | None, _option("--samples", "N", "Windows to calibrate on.", _TEXT)]
Seqlen = Annotated[int | None, _option("--seqlen", "L", "Tokens per window.", _TEXT)]
Seed = Annotated[int | None, _option("--seed", "N", "Of every random choice.")]
Runtime = Annotated[
    str | None, _option("--runtime", "WHEN", "Prove in stock llama.cpp: auto, require or off.")
]

Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to create.")
]
Overwrite = Annotated[bool, _switch("--overwrite", "Replace an earlier output folder.")]
RunDir = Annotated[Path | None, _option("--run-dir", "DIR", "Keeps finished blocks for a resume.")]
Fresh = Annotated[bool, _switch("--fresh", "Start over instead of resuming.")]
AllowPickle = Annotated[bool, _switch("--allow-pickle", "Read PyTorch pickles; they can run code.")]
DryRun = Annotated[bool, _switch("--dry-run", "Print every tensor's type and size, then stop.")]
ProgressMode = Annotated[str, _option("--progress", "MODE", "auto, plain, json or quiet.")]
Debug = Annotated[bool, _switch("--debug", "Show the traceback of an error.")]
OriginalModel = Annotated[
    str | None, _option("--model", "MODEL", "Where the original is now, if it moved.")
]


@dataclass(frozen=True)
class RecipeChoice:
    """What the command line says about the recipe, not yet validated.

    Attributes:
        preset: Name of the preset.
        file: TOML recipe, if any.
        overrides: ``key=value`` texts, in order.
        options: Values by dotted recipe key; None where the option was not given.
        composed: Bits, group size and symmetry, which together mean a type; None likewise.
    """

    preset: str
    file: Path | None
    overrides: tuple[str, ...]
    options: dict[str, Any]
    composed: tuple[int | None, int | None, bool | None] = (None, None, None)

    def resolve(self) -> ResolvedRecipe:
        """Layer and validate; imports pydantic, which ``--help`` must not pay for."""
        from pipeline.recipe_files import load_recipe

        resolved = load_recipe(self.preset, self.file, self.overrides, self.options)
        if self.composed == (None, None, None):
            return resolved
        from pipeline.recipe_files import OPTION
        from pipeline.targets import compose_type

        if resolved.origins["type"] in ("--set", OPTION):
            raise UsageError(
                f"type {resolved.recipe.type} and --bits, --group-size or --symmetric",
                why="both say what the weights are",
                fix="give the one or the other",
            )
        kind = compose_type(resolved.recipe.target, *self.composed)
        return load_recipe(self.preset, self.file, self.overrides, {**self.options, "type": kind})


def recipe_options(
    model: Model = None,
    preset: Preset = "balanced",
    recipe: RecipeFile = None,
    overrides: Overrides = None,
    revision: Revision = None,
    target: Target = None,
    weight_type: WeightType = None,
    target_size: TargetSize = None,
    target_bpw: TargetBpw = None,
    bits: Bits = None,
    group_size: GroupSize = None,
    symmetric: Symmetric = None,
    attention: Attention = None,
    pure: Pure = False,
    tensor_types: TensorTypes = None,
    token_embedding_type: EmbeddingType = None,
    output_tensor_type: OutputType = None,
    allow_fallback: AllowFallback = False,
    emit: Emit = None,
    imatrix: Imatrix = None,
    transforms: Transforms = None,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    runtime: Runtime = None,
) -> RecipeChoice:
    """The options that choose a recipe."""
    options = {
        "model": model,
        "revision": revision,
        "target": target,
        "type": weight_type,
        "target_size": target_size,
        "target_bpw": target_bpw,
        "pure": pure or None,
        "tensor_types": tuple(tensor_types) if tensor_types else None,
        "token_embedding_type": token_embedding_type,
        "output_tensor_type": output_tensor_type,
        "allow_fallback": allow_fallback or None,
        "emit": tuple(emit) if emit else None,
        "imatrix": imatrix,
        "transforms": tuple(transforms) if transforms else None,
        "seed": seed,
        "calibration.source": calibration,
        "calibration.samples": samples,
        "calibration.seqlen": seqlen,
        "evaluation.source": evaluation,
        "runtime.llamacpp": runtime,
        "onnx.attention": attention,
    }
    composed = (bits, group_size, symmetric)
    return RecipeChoice(preset, recipe, tuple(overrides or ()), options, composed)


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's first parameter, a `RecipeChoice`, by the options that make one."""
    shared = _parameters(recipe_options)
    own = _parameters(command)[1:]

    @wraps(command)
    def wrapper(**arguments: Any) -> None:
        choice = recipe_options(**{p.name: arguments.pop(p.name) for p in shared})
        command(choice, **arguments)

    parameters = [*own, *shared]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """A function's parameters with their annotations as objects, keyword-only."""
    hints = get_type_hints(function, include_extras=True)
    return [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
    ]
