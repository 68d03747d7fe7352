"""Rewrite the checkpoint without changing its function, as the recipe asks, and prove it.

Nothing of the model is kept but the changes: vectors of a space's width for orders, scales and
Hadamard rotations, matrices for random orthogonal ones. Weights are rewritten in float64 whenever
they are read, one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.architectures.spaces import Space, online_spaces, spaces_of
from pipeline.errors import InputError, UsageError, VerificationError
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.report import Gate
from pipeline.stages.limits import limit_gate
from pipeline.stages.load import Source
from pipeline.stages.measure import building, judging, measuring, rounding
from pipeline.transforms import TRANSFORMS, Transform, parse_transform
from pipeline.transforms.changes import flatten, unflatten
from pipeline.transforms.model import Model
from runtimes.exact_reference import ExactReference
from runtimes.torch_reference import TorchReference

PART = "transforms"
FILE = f"{PART}.safetensors"
"""Where the changes that were measured are kept: run directory, output folder."""

EXACT, ROUNDED = 1e-9, 1e-4
"""Most relative rms difference of logits, in float64 and in float32."""

WINDOWS, LENGTH = 2, 64
"""Tokens that the claim is checked on, drawn from the vocabulary: every block and channel is used,
and the claim holds for any tokens."""

CLAIM = "the rewritten weights compute the checkpoint's logits"


class Parts(Protocol):
    """Where measured changes are kept, see `pipeline.run_directory.RunDirectory`."""

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A stored part, or None."""
        ...

    def store(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Store a part."""
        ...


@dataclass(frozen=True)
class Delivered:
    """The changes that an output folder was made with.

    Attributes:
        folder: The output folder.
    """

    folder: Path

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `keep_changes` wrote. Raises InputError if it is not there or damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                meta = json.loads(file.metadata()["changes"])
                return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"cannot read {path}",
                why=str(error),
                fix="deploy again, or fetch the folder again",
            ) from error

    def store(self, name: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Nothing: the folder is complete."""


def transform(
    recipe: Recipe, source: Source, windows: Tensor, parts: Parts, progress: Progress
) -> Source:
    """Apply the recipe's transforms in order and check that the function is the same.

    Args:
        recipe: Names them.
        source: The checkpoint, untied already if that is needed.
        windows: Calibration tokens, int64 [samples, length].
        parts: Keeps changes that were measured, so that no one measures twice.
        progress: Told what was left out and how exact the result is.

    Raises:
        UsageError: A transform does not fit the model.
        VerificationError: The rewritten model computes something else.
    """
    transforms = [parse_transform(text) for text in recipe.transforms]
    if not transforms:
        return source
    if recipe.budgeted and any(one.measures for one in transforms):
        progress.warning(
            f"transforms are measured with {recipe.weight_type}: a budget chooses types after them"
        )
    model = _kept(transforms, source, parts) or _planned(
        transforms, recipe, source, windows, parts, progress
    )
    notes = tuple(dict.fromkeys([*model.notes, *_bound_notes(model)]))
    source = replace(
        source, changes=tuple(model.changes), rewrite_notes=notes, bounds=tuple(model.bounds)
    )
    for note in notes:
        progress.note(note)
    gates = exactness(source, recipe.seed)
    for gate in gates:
        progress.note(f"{gate.runtime}: logits differ by {gate.figure:.2g} after the transforms")
    red = [gate for gate in gates if gate.status == "red"]
    if red:
        raise VerificationError(
            f"the transforms change what the model computes: {red[0].figure:.2g} in "
            f"{red[0].runtime}, allowed is {red[0].limit}",
            why="this is a bug, or the checkpoint's numbers are beyond the precision",
            fix="leave the transforms out, and report it",
        )
    return replace(source, exactness=gates)


def _spaces(source: Source) -> tuple[Space, ...]:
    model = (source.checkpoint.architecture, source.checkpoint.config)
    return (*spaces_of(*model), *online_spaces(*model))


def _kept(transforms: list[Transform], source: Source, parts: Parts) -> Model | None:
    if not any(one.measures for one in transforms):
        return None
    loaded = parts.load(PART)
    if loaded is None:
        return None
    tensors, meta = loaded
    spaces = _spaces(source)
    changes = unflatten(tensors, meta["changes"], spaces)
    return Model(spaces, source.exact, changes, notes=meta["notes"], bounds=meta["bounds"])


def _planned(
    transforms: list[Transform],
    recipe: Recipe,
    source: Source,
    windows: Tensor,
    parts: Parts,
    progress: Progress,
) -> Model:
    def tell(number: int, count: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            progress.figure(name, value)
        progress.block(number, count)

    model = Model(
        _spaces(source),
        source.exact,
        measure=measuring(recipe, source, windows),
        judge=judging(recipe, source),
        quantize=rounding(recipe, source),
        build=building(recipe, source, windows),
        tell=tell,
    )
    for one in transforms:
        module, _, function = TRANSFORMS[one.kind].plan.partition(":")
        plan: Callable[[Model, Any], None] = getattr(import_module(module), function)
        try:
            plan(model, one.options)
        except ValueError as error:
            raise UsageError(
                f"the transform {one} does not fit this model",
                why=str(error),
                fix="`python -m pipeline ls transforms` lists kinds and options",
            ) from error
    if any(one.measures for one in transforms):
        tensors, described = flatten(model.changes)
        meta = {"changes": described, "notes": model.notes, "bounds": model.bounds}
        parts.store(PART, tensors, meta)
    return model


def _bound_notes(model: Model) -> list[str]:
    """The worst bound of each kind of space, in words."""
    worst: dict[str, dict[str, Any]] = {}
    for bound in model.bounds:
        kind = bound["space"].rpartition(" ")[2]
        if kind not in worst or bound["bound before"] > worst[kind]["bound before"]:
            worst[kind] = bound
    return [
        f"outliers after a rotation of blocks of {bound['block']} in {bound['space']} can reach, "
        f"in the mean over tokens, {bound['bound after']:.3g}, before the permutation "
        f"{bound['bound before']:.3g}, with equal masses {bound['least bound']:.3g}"
        for bound in worst.values()
    ]


def keep_changes(folder: Path, recipe: Recipe, source: Source) -> None:
    """Write measured changes into the output folder, so that `verify` need not measure again."""
    if not any(parse_transform(text).measures for text in recipe.transforms):
        return
    from safetensors.torch import save_file

    tensors, described = flatten(source.changes)
    meta = json.dumps(
        {"changes": described, "notes": list(source.rewrite_notes), "bounds": list(source.bounds)}
    )
    save_file(tensors, folder / FILE, metadata={"changes": meta})


@torch.inference_mode()
def exactness(source: Source, seed: int) -> tuple[Gate, ...]:
    """Gates on the logits before and after, in float64 and in float32.

    Args:
        source: The checkpoint with its changes.
        seed: Of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(source.config.vocab_size)
    tokens = torch.randint(vocabulary, (WINDOWS, LENGTH), generator=generator)
    gates = []
    for kind, after, limit in (
        (ExactReference, source.exact, EXACT),
        (TorchReference, source.read, ROUNDED),
    ):
        old, new = (
            torch.stack(list(model.logits(tokens)))
            for model in (
                kind(source.config, source.original, head=source.head),
                kind(source.config, after, head=source.head, inner=source.inner),
            )
        )
        figure = float((new - old).norm() / old.norm())
        runtime = "PyTorch, float64" if kind is ExactReference else "PyTorch, float32"
        gates.append(limit_gate("transform", CLAIM, runtime, "relative rms", figure, limit))
    return tuple(gates)
