"""The types that each matrix may get under a budget, and every matrix solved in each of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from exporters.gguf import gguf_name
from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.errors import ResourceError
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import LayerOptions, quantize_free, quantize_layer
from pipeline.quantization.objective import LayerObjective
from pipeline.quantization.tensor_scale import format_for
from pipeline.recipe import Recipe, split_tensor_type
from pipeline.run_directory import RunDirectory
from pipeline.stages.quantize import layer_options, part_of
from pipeline.stages.stored import FLOAT_TYPES, StoredTensor
from pipeline.stages.walk import split_rows, store_free

if TYPE_CHECKING:
    from pipeline.stages.load import Source

WIDE = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""For rows that are whole blocks of 256: from 2.625 to 8.5 bits, no two of one size.

Left out: Q4_0, IQ4_NL and NVFP4, which are as large as Q4_K and worse; Q4_1, Q5_0, Q5_1 and MXFP4,
likewise beaten by the type of their size or a smaller one; Q2_0, TQ1_0 and TQ2_0, which stock
llama.cpp computes slowly or only means for models that were trained in them."""

NARROW = ("Q2_0", "Q4_0", "IQ4_NL", "Q5_0", "Q8_0")
"""For other widths; those of them whose blocks (32, of Q2_0 64) divide the width."""

SHARE = "share"

PROBED_ROWS = 64
"""Rows of a site that are also solved as the recipe asks, to tell how much better that is."""

OPTIONS = LayerOptions(scales="absmax", rounding="gptq", mismatch=0.0)
"""How candidates are solved: scales from the range, with error feedback. The search for scales and
the refinement of the presets would take most of the time of a run for each of the types."""


@dataclass(frozen=True)
class Candidate:
    """A matrix in one of its candidate types.

    Attributes:
        name: Hugging Face name.
        stored: Quickly solved.
        share: Squared output error that the recipe's own method leaves, as a share of this one's.
    """

    name: str
    stored: StoredTensor
    share: float = 1.0


def candidate_types(width: int) -> tuple[str, ...]:
    """Types that a row of `width` weights may get; empty if no block divides it."""
    pool = WIDE if get_format(WIDE[0]).fits(width) else NARROW
    return tuple(kind for kind in pool if get_format(kind).fits(width))


def choices(source: Source, recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Candidate types of every matrix of the plan; pinned ones have the plan's type alone.

    Args:
        source: The checkpoint, with the plan that `plan_types` makes before a budget is spent.
        recipe: Says which matrices are pinned.
    """
    fixed = pinned(source, recipe)
    return {
        name: (kind,) if name in fixed else candidate_types(source.shapes[name][1]) or (kind,)
        for name, kind in source.plan.types.items()
    }


def pinned(source: Source, recipe: Recipe) -> frozenset[str]:
    """Matrices whose type the recipe names: tables, and what its patterns fit."""
    found = set()
    if recipe.token_embedding_type is not None:
        found.add(EMBEDDING)
    if recipe.output_tensor_type is not None:
        found |= {HEAD, EMBEDDING} if source.checkpoint.tied else {HEAD}
    patterns = [split_tensor_type(text)[0] for text in recipe.tensor_types]
    for name in source.plan.types:
        if any(re.search(pattern, gguf_name(name)) for pattern in patterns):
            found.add(name)
    return frozenset(found)


def solve_site(
    weights: Mapping[str, Tensor],
    types: Mapping[str, tuple[str, ...]],
    objective: LayerObjective,
    options: LayerOptions,
) -> Iterator[Candidate]:
    """The matrices of one site in each of their candidate types.

    Args:
        weights: Float weights by name, [out, in].
        types: Candidates by name.
        objective: Second moments of the site's input in the float model.
        options: The recipe's method, which `PROBED_ROWS` rows are solved by as well.
    """
    for kind in dict.fromkeys(kind for name in weights for kind in types[name]):
        names = [name for name in weights if kind in types[name]]
        if kind in FLOAT_TYPES:
            yield from (Candidate(n, StoredTensor.floating(kind, weights[n].cpu())) for n in names)
            continue
        stacked = torch.cat([weights[name] for name in names])
        fmt = format_for(kind, stacked)
        solved = quantize_layer(stacked, objective, fmt, OPTIONS)
        rows = torch.arange(0, len(stacked), max(1, len(stacked) // PROBED_ROWS))
        probe = quantize_layer(stacked[rows], objective, fmt, options)
        share = float(probe.loss.sum() / solved.loss[rows].sum().clamp_min(1e-300))
        parts = split_rows(solved.quantized, [len(weights[n]) for n in names])
        for name, part in zip(names, parts, strict=True):
            yield Candidate(name, StoredTensor(kind, part), share)


def solve_table(name: str, kind: str, weight: Tensor) -> Candidate:
    """Embedding or head in one candidate type.

    Args:
        name: Hugging Face name.
        kind: The type.
        weight: Float weights, [vocabulary, hidden].
    """
    if kind in FLOAT_TYPES:
        return Candidate(name, StoredTensor.floating(kind, weight))
    quick = quantize_free(weight, format_for(kind, weight), "absmax")
    rows = torch.arange(0, len(weight), max(1, len(weight) // PROBED_ROWS))
    probe = store_free(kind, weight[rows]).dequantize() - weight[rows]
    errors = quick.dequantize()[rows] - weight[rows]
    share = float(probe.double().square().sum() / errors.double().square().sum().clamp_min(1e-300))
    return Candidate(name, StoredTensor(kind, quick), share)


def probe_options(recipe: Recipe) -> LayerOptions:
    """The recipe's method on the float model's inputs: nothing of earlier blocks to correct."""
    options = replace(layer_options(recipe), mismatch=0.0, stream_correction=0.0)
    if options.rounding in ("gptaq", "qronos", "gpfq"):  # they differ from gptq in what is zero
        options = replace(options, rounding="gptq")
    return options


class CandidateStore:
    """Candidates of all matrices in the run directory, read one part at a time.

    Args:
        run: The run directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._part: tuple[str, dict[str, Tensor]] = ("", {})

    def keep(self, part: str, found: Iterable[Candidate], **beside: Tensor) -> None:
        """Store the candidates of a part, and more tensors under names of their own."""
        tensors = dict(beside)
        for one in found:
            key = f"{one.name}@{one.stored.type}"
            tensors |= one.stored.flatten(key)
            tensors[f"{key}:{SHARE}"] = torch.tensor(one.share, dtype=torch.float64)
        self._run.store(part, tensors)

    def has(self, part: str) -> bool:
        """Whether a part is stored and sound."""
        return self._load(part) is not None

    def beside(self, part: str, name: str) -> Tensor:
        """One of the other tensors of a part."""
        return self._tensors(part)[name]

    def change(self, name: str, kind: str, weight: Tensor) -> Tensor:
        """What a candidate type adds to a matrix, float32 [out, in].

        The quick solution's error, made as small as that of the recipe's method.

        Args:
            name: Hugging Face name.
            kind: One of its candidate types.
            weight: The float weights.
        """
        key = f"{name}@{kind}"
        tensors = dict(self._tensors(candidates_part(name)))
        share = float(tensors.pop(f"{key}:{SHARE}"))
        quick = StoredTensor.restore(key, kind, tensors).dequantize().to(weight.device)
        return (quick - weight) * math.sqrt(share)

    def _load(self, part: str) -> dict[str, Tensor] | None:
        loaded = self._run.load(part)
        return None if loaded is None else loaded[0]

    def _tensors(self, part: str) -> dict[str, Tensor]:
        if self._part[0] != part:
            found = self._load(part)
            if found is None:
                raise ResourceError(
                    f"finished part {part} is no longer sound in {self._run.path}",
                    why="it was read before, so the disk or another program changed it",
                    fix="run the same command again: the part is computed again",
                )
            self._part = (part, found)
        return self._part[1]


def candidates_part(name: str) -> str:
    """Part of the run directory that holds a matrix's candidates; embedding and head share one."""
    return f"candidates-{part_of(EMBEDDING if name == HEAD else name)}"
