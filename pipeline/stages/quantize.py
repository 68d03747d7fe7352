"""Quantize block by block; what is finished stays in the run directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.errors import ResourceError, UsageError
from pipeline.progress import Progress
from pipeline.quantization.layer import LayerOptions
from pipeline.recipe import Recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.load import Source
from pipeline.stages.stored import FLOAT_TYPES, StoredTensor
from pipeline.stages.token_weights import token_weights
from pipeline.stages.walk import Walk, WalkSettings, store_free

TABLES, OWN_HEAD = "tables", "head"

WIDE = "Q8_0"
"""A head of this type is not calibrated: there is nothing to gain."""

BIAS = "bias:"
"""Prefix of a corrected bias in a part."""

IMPORTANCE = "importance:"
"""Prefix of what a part holds beside each matrix: the mean squares of its inputs."""


@dataclass
class QuantizedModel:
    """The finished matrices, read from the run directory one part at a time.

    Attributes:
        sites: One record a site: block, site, relative loss, tokens, dead inputs, damping steps;
            or one a repacked matrix, see `stages.repack`.
        gains: Gains of norms that are not the checkpoint's, float32 by Hugging Face name.
        tuned: How they came about, see `stages.tune`.
        notes: What to say of all that.
    """

    source: Source
    run: RunDirectory
    sites: list[dict[str, Any]]
    gains: Mapping[str, Tensor] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    _part: tuple[str, dict[str, StoredTensor], dict[str, Tensor]] = ("", {}, {})

    def stored(self, name: str) -> StoredTensor:
        """A matrix of the plan, by Hugging Face name."""
        self._open(part_of(name))
        return self._part[1][name]

    def _open(self, part: str) -> None:
        if self._part[0] == part:
            return
        loaded = self.run.load(part)
        if loaded is None:
            raise ResourceError(
                f"finished part {part} is no longer sound in {self.run.path}",
                why="it was read before, so the disk or another program changed it",
                fix="run the same command again: the part is computed again",
            )
        self._part = (part, restore_part(loaded), biases_of(loaded[0]))

    def read(self, name: str) -> Tensor:
        """The weight that the runtime computes with, float32; float tensors as they are, gains as
        they were tuned and biases as they were corrected."""
        if name in self.source.plan.types:
            return self.stored(name).dequantize()
        if name in self.gains:
            return self.gains[name]
        if name.endswith(".bias"):
            self._open(part_of(name))
        corrected = self._part[2].get(name)
        return self.source.read(name) if corrected is None else corrected

    def importance(self) -> dict[str, Tensor]:
        """Mean square of the inputs of every decoder matrix, float32 [in], by name."""
        found: dict[str, Tensor] = {}
        for part in dict.fromkeys(map(part_of, self.source.plan.types)):
            loaded = self.run.load(part)
            for name, value in (loaded or ({}, {}))[0].items():
                if name.startswith(IMPORTANCE):
                    found[name.removeprefix(IMPORTANCE)] = value
        return found

    def counts(self) -> dict[str, int]:
        """How often something was done differently from what was asked."""
        return {
            "types replaced": len(self.source.plan.replaced),
            "sites with raised damping": sum(s["damping_raised"] > 0 for s in self.sites),
            "dead inputs": sum(s["dead_inputs"] for s in self.sites),
            "matrices repacked inexactly": sum(not s.get("exact", True) for s in self.sites),
            "damaged parts recomputed": self.run.dropped,
        }


def part_of(name: str) -> str:
    """Part of the run directory that holds a matrix."""
    if name in (EMBEDDING, HEAD):
        return TABLES if name == EMBEDDING else OWN_HEAD
    return f"block-{int(name.split('.')[2]):04d}"


def check_types(part: str, meta: Mapping[str, Any], source: Source) -> None:
    """Refuse a finished part whose matrices have other types than the plan.

    Raises:
        UsageError: They have, as after a change of what a budget's choice was made from.
    """
    for name, kind in meta["types"].items():
        wanted = source.plan.types.get(name)
        if kind != wanted:
            raise UsageError(
                f"the finished part {part} holds {name} in {kind}, and the plan is {wanted}",
                fix="add --fresh to start over, or choose another --run-dir",
            )


def biases_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The corrected biases of a stored part by Hugging Face name."""
    return {n.removeprefix(BIAS): bias for n, bias in tensors.items() if n.startswith(BIAS)}


def restore_part(loaded: tuple[dict[str, Tensor], dict[str, Any]]) -> dict[str, StoredTensor]:
    """The matrices of a stored part by Hugging Face name."""
    tensors, meta = loaded
    return {n: StoredTensor.restore(n, kind, tensors) for n, kind in meta["types"].items()}


def quantize(
    recipe: Recipe, source: Source, windows: Tensor, run: RunDirectory, progress: Progress
) -> QuantizedModel:
    """Quantize every matrix of the plan; finished blocks are taken from the run directory.

    Args:
        recipe: Types and methods.
        source: The checkpoint.
        windows: Calibration tokens, int64 [samples, length].
        run: Where finished blocks are kept.
        progress: Told about blocks and the errors of their sites.

    Raises:
        InputError: Activations or moments are not finite; names block and site.
        ResourceError: The device that the recipe asks for is not there.
    """
    weights = None
    if recipe.calibration.gradient_weighting:
        weights = token_weights(source, windows, recipe, run, progress)
        progress.phase("blocks")
    with torch.inference_mode():
        return _quantize(recipe, source, windows, weights, run, progress)


def _quantize(
    recipe: Recipe,
    source: Source,
    windows: Tensor,
    weights: Mapping[str, Tensor] | None,
    run: RunDirectory,
    progress: Progress,
) -> QuantizedModel:
    embedding, head = _embedding(source, run), run.load(OWN_HEAD)
    walk = Walk(source, embedding.dequantize(), windows, walk_settings(recipe), weights)
    sites: list[dict[str, Any]] = []
    for index in range(walk.n_blocks):
        part = f"block-{index:04d}"
        loaded = run.load(part)
        progress.block(index + 1, walk.n_blocks, resumed=loaded is not None)
        if loaded is not None:
            check_types(part, loaded[1], source)
            if index + 1 < walk.n_blocks or head is None:
                walk.replay(index, restore_part(loaded), biases_of(loaded[0]))
            sites += loaded[1]["sites"]
            continue
        stored: dict[str, StoredTensor] = {}
        records = []
        beside: dict[str, Tensor] = {}
        for solved in walk.solve(index):
            stored |= solved.stored
            for name in solved.stored:  # safetensors refuses tensors that share memory
                beside[f"{IMPORTANCE}{name}"] = solved.importance.clone()
            beside |= {f"{BIAS}{name}": bias for name, bias in solved.biases.items()}
            records.append(solved.record)
            progress.figure(solved.record["site"], solved.record["loss"])
        keep_part(run, part, stored, records, beside)
        sites += records
    if HEAD in source.plan.types:
        if head is not None:
            check_types(OWN_HEAD, head[1], source)
        sites += _head(source, run, walk, progress) if head is None else head[1]["sites"]
    return QuantizedModel(source, run, sites)


def _embedding(source: Source, run: RunDirectory) -> StoredTensor:
    """The embedding, which needs no calibration, from the run directory or stored in it."""
    loaded = run.load(TABLES)
    if loaded is None:
        found = {EMBEDDING: store_free(source.plan.types[EMBEDDING], source.read(EMBEDDING))}
        keep_part(run, TABLES, found, [])
        return found[EMBEDDING]
    check_types(TABLES, loaded[1], source)
    return restore_part(loaded)[EMBEDDING]


def _head(
    source: Source, run: RunDirectory, walk: Walk, progress: Progress
) -> list[dict[str, Any]]:
    """Solve a head of its own and store it in the run directory; gives its records."""
    kind, records = source.plan.types[HEAD], []
    if kind in (*FLOAT_TYPES, WIDE):
        stored = {HEAD: store_free(kind, source.read(HEAD))}
    else:
        solved = walk.solve_head()
        stored, records = solved.stored, [solved.record]
        progress.figure("head", solved.record["loss"])
    keep_part(run, OWN_HEAD, stored, records)
    return records


@dataclass(frozen=True)
class Part:
    """What a part of the run directory holds.

    Attributes:
        stored: Matrices by Hugging Face name.
        sites: Their records.
        beside: More tensors, under names of their own.
    """

    stored: dict[str, StoredTensor]
    sites: list[dict[str, Any]]
    beside: Mapping[str, Tensor] | None = None


def part_by_part(
    source: Source, run: RunDirectory, progress: Progress, make: Callable[[list[str]], Part]
) -> QuantizedModel:
    """A model whose parts do not depend on each other; finished ones are taken from `run`.

    Args:
        source: The checkpoint.
        run: Where finished parts are kept.
        progress: Told about parts.
        make: From the names of a part's matrices to their content.
    """
    names: dict[str, list[str]] = {}
    for name in source.plan.types:
        names.setdefault(part_of(name), []).append(name)
    sites: list[dict[str, Any]] = []
    for index, part in enumerate(names):
        loaded = run.load(part)
        progress.block(index + 1, len(names), resumed=loaded is not None)
        if loaded is None:
            made = make(names[part])
            keep_part(run, part, made.stored, made.sites, made.beside)
            sites += made.sites
        else:
            sites += loaded[1]["sites"]
    return QuantizedModel(source, run, sites)


def keep_part(
    run: RunDirectory,
    part: str,
    stored: dict[str, StoredTensor],
    sites: list[dict[str, Any]],
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Store a finished part.

    Args:
        run: The run directory.
        part: Its name, see `part_of`.
        stored: Matrices by Hugging Face name.
        sites: Their records.
        beside: More tensors to keep, under names of their own.
    """
    tensors: dict[str, Tensor] = dict(beside or {})
    for name, tensor in stored.items():
        tensors |= tensor.flatten(name)
    types = {name: tensor.type for name, tensor in stored.items()}
    run.store(part, tensors, {"types": types, "sites": sites})


def walk_settings(recipe: Recipe) -> WalkSettings:
    """The part of a recipe that `Walk` takes."""
    return WalkSettings(
        options=layer_options(recipe),
        damping=recipe.quantization.damping,
        shrinkage=recipe.quantization.shrinkage,
        held_out=recipe.calibration.held_out,
        batch=recipe.calibration.batch,
        device=recipe.device,
        mismatch_estimate=recipe.calibration.mismatch_estimate,
        seed=recipe.seed,
        magr=recipe.quantization.magr,
        bias_correction=recipe.quantization.bias_correction,
    )


def layer_options(recipe: Recipe) -> LayerOptions:
    """The part of a recipe that `quantize_layer` takes."""
    quantization = recipe.quantization
    return LayerOptions(
        scales=quantization.scales,
        hessian=quantization.hessian,
        free_scales=quantization.free_scales,
        signed=quantization.signed,
        metric=quantization.metric,
        interleave=quantization.interleave,
        rounding=quantization.rounding,
        passes=quantization.passes,
        activation_order=quantization.activation_order,
        orders=quantization.orders,
        refine_rounds=quantization.refine_rounds,
        mismatch=recipe.calibration.mismatch,
        stream_correction=recipe.calibration.stream_correction,
        seed=recipe.seed,
    )
