"""Quantize under an importance matrix that was measured elsewhere, without activations.

All that is known of a matrix's inputs is their mean squares, so that H is diagonal: columns do not
see each other's errors, sequential rounding is rounding to nearest, and there is no error of the
blocks before to correct. PiSO's scales are exact for that H where a block has one scale.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.gguf import gguf_name
from exporters.gguf.imatrix import read_imatrix
from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.errors import InputError, UsageError
from pipeline.progress import Progress
from pipeline.quantization.layer import LayerOptions, LayerResult, quantize_layer
from pipeline.quantization.objective import LayerObjective
from pipeline.quantization.tensor_scale import format_for
from pipeline.recipe import Recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.load import Source
from pipeline.stages.quantize import (
    IMPORTANCE,
    Part,
    QuantizedModel,
    layer_options,
    part_by_part,
)
from pipeline.stages.stored import FLOAT_TYPES, StoredTensor
from pipeline.stages.walk import choose_device, split_rows, store_free


def importance_of(recipe: Recipe, source: Source) -> dict[str, np.ndarray]:
    """Mean squared inputs of every decoder matrix that is quantized, by Hugging Face name.

    Raises:
        InputError: The recipe's file is refused, or lacks a matrix or has another width for it.
        UsageError: The checkpoint is 4-bit already, or the same file is asked for.
    """
    _refuse_unused(recipe)
    if recipe.imatrix is None:
        return {}
    if source.checkpoint.packed or "imatrix" in recipe.emit:
        raise UsageError(
            "--imatrix cannot be combined with a packed 4-bit checkpoint or --emit imatrix",
            why="the one is repacked as it is, the other would write the same file again",
            fix="leave one of the two out",
        )
    path = Path(recipe.imatrix)
    measured = read_imatrix(path)
    found = {}
    for name, kind in source.plan.types.items():
        if name in (EMBEDDING, HEAD) or kind in FLOAT_TYPES:
            continue
        width, vector = source.shapes[name][1], measured.get(gguf_name(name))
        if vector is None or len(vector) != width:
            what = "no entry" if vector is None else f"{len(vector)} inputs instead of {width}"
            raise InputError(
                f"{path} does not belong to this model: {what} for {gguf_name(name)}",
                why="every matrix that is quantized needs the mean squares of its inputs",
                fix="run llama-imatrix on this model, or leave --imatrix out to calibrate here",
            )
        found[name] = vector
    return found


def _refuse_unused(recipe: Recipe) -> None:
    """Settings that an importance matrix would leave without effect, or that would change what it
    says."""
    weighting = recipe.calibration.gradient_weighting > 0
    if weighting and "imatrix" in recipe.emit:
        raise UsageError(
            "calibration.gradient_weighting cannot be combined with --emit imatrix",
            why="the means of the inputs' squares would be weighted, which no reader expects",
            fix="leave one of the two out",
        )
    if recipe.imatrix is not None and (weighting or recipe.quantization.magr > 0):
        raise UsageError(
            "--imatrix cannot be combined with calibration.gradient_weighting or quantization.magr",
            why="both need calibration text, in whose place the importance matrix is taken",
            fix="leave one of the two out",
        )


@torch.inference_mode()
def quantize_weighted(
    recipe: Recipe,
    source: Source,
    importance: dict[str, np.ndarray],
    run: RunDirectory,
    progress: Progress,
) -> QuantizedModel:
    """Quantize every matrix of the plan; finished blocks are taken from the run directory.

    Args:
        recipe: Types and methods.
        source: The checkpoint.
        importance: What `importance_of` found.
        run: Where finished blocks are kept.
        progress: Told about blocks and the loss of each matrix.
    """
    progress.note("an importance matrix is a diagonal H: nothing is fed forward or corrected")
    device = choose_device(recipe.device)
    options = weighted_options(layer_options(recipe))

    def make(names: list[str]) -> Part:
        stored, records, beside = {}, [], {}
        for name in names:
            kind, weight = source.plan.types[name], source.read(name)
            if name not in importance:
                stored[name] = store_free(kind, weight)
                continue
            means = torch.from_numpy(importance[name])
            objective = LayerObjective.from_moments(
                means.double().diag().to(device), damping=recipe.quantization.damping
            )
            fmt = format_for(kind, weight)
            result = quantize_layer(weight.to(device), objective, fmt, options)
            stored[name] = StoredTensor(kind, next(split_rows(result.quantized, [len(weight)])))
            beside[f"{IMPORTANCE}{name}"] = means
            records.append(_record(name, result, objective))
            progress.figure(name.removesuffix(".weight").rpartition(".")[2], result.relative_loss)
        return Part(stored, records, beside)

    return part_by_part(source, run, progress, make)


def _record(name: str, result: LayerResult, objective: LayerObjective) -> dict[str, Any]:
    return {
        "matrix": name,
        "loss": result.relative_loss,
        "damping_raised": objective.damping_raised,
        "dead_inputs": objective.dead_inputs,
    }


def weighted_options(options: LayerOptions) -> LayerOptions:
    """The recipe's options without what needs more than a diagonal H."""
    return replace(options, rounding="nearest", orders=1, mismatch=0.0, stream_correction=0.0)
