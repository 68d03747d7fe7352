"""Spend a budget of bytes: measure, choose exactly, and improve the choice by exchanges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exporters.gguf import gguf_name
from pipeline.allocation.knapsack import Option, solve
from pipeline.errors import InputError, UsageError, VerificationError
from pipeline.progress import Progress
from pipeline.recipe import WEIGHT_TYPES, Recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.candidates import CandidateStore, choices
from pipeline.stages.export import FileSizes, file_sizes
from pipeline.stages.load import Source
from pipeline.stages.plan import TypePlan
from pipeline.stages.sensitivity import SCORED_WINDOWS, Losses, Sensitivity, WindowSplit
from pipeline.stages.stored import FLOAT_TYPES
from pipeline.stages.swaps import PlanJudge, Swapped, improve
from pipeline.stages.walk import choose_device

ALLOCATION = "allocation"

CANDIDATE_BYTES = 9.5
"""Disk that the candidates of a parameter take: 7 of a byte for the code, and scales."""


@dataclass(frozen=True)
class Allocation:
    """The types that a budget bought.

    Attributes:
        types: By Hugging Face name.
        losses: Estimated divergence of each matrix in its type, nats a token; empty if nothing had
            to be measured.
        budget: Most bytes of the file.
        size: Bytes of the file with these types.
        estimate: Sum of the losses of the knapsack's choice.
        gap: How much smaller the sum of another choice might be: 0 if it is proven best.
        before: Divergence of the knapsack's choice on the windows that judge exchanges, or None.
        after: The same after exchanges.
        tried: Exchanges that were judged.
        kept: Those kept: the new types by name, and the divergence that they led to.
        notes: What else is to be said.
    """

    types: dict[str, str]
    losses: dict[str, float]
    budget: int
    size: int
    estimate: float
    gap: float
    before: float | None
    after: float | None
    tried: int
    kept: list[dict[str, Any]]
    notes: list[str]

    def record(self) -> dict[str, Any]:
        """Everything as JSON values, with GGUF names."""
        named = {
            "types": {gguf_name(n): kind for n, kind in self.types.items()},
            "losses": {gguf_name(n): loss for n, loss in self.losses.items()},
        }
        return asdict(self) | named

    def summary(self) -> list[str]:
        """What a report says of it."""
        lines = [f"types chosen for {self.budget:,} bytes: {self.size:,} used", *self.notes]
        if self.before is not None:
            least = f"at most {self.gap:.2g} above the least" if self.gap else "proven the least"
            lines.append(
                f"estimated KLD {self.estimate:.4g}, {least}; "
                f"all types together in PyTorch {self.before:.4g}, after {len(self.kept)} of "
                f"{self.tried} exchanges {self.after:.4g}"
            )
        return lines


def budget_bytes(recipe: Recipe, parameters: int) -> int:
    """Most bytes of the file.

    Args:
        recipe: Gives a size, or bits of the file a parameter.
        parameters: Of the model.
    """
    if recipe.target_size is not None:
        return recipe.target_size
    if recipe.target_bpw is None:
        raise ValueError("the recipe has no budget")
    return int(recipe.target_bpw * parameters / 8)


def disk_bytes(source: Source, recipe: Recipe) -> int:
    """What the run directory takes for candidates, and for streams and gradients at every block."""
    size = source.checkpoint.architecture.dimensions(source.checkpoint.config)
    scored = SCORED_WINDOWS * recipe.calibration.seqlen * size.hidden * 4
    candidates = int(CANDIDATE_BYTES * source.checkpoint.num_parameters)
    return candidates + 2 * size.layers * scored


def check_budget(source: Source, recipe: Recipe) -> None:
    """Refuse a budget that nothing fits in, before any work.

    Raises:
        UsageError: Says the least size.
    """
    sizes, types = file_sizes(source, recipe), choices(source, recipe)
    budget = budget_bytes(recipe, source.checkpoint.num_parameters)
    least = sizes.total(_extreme(types, sizes, largest=False))
    if least > budget:
        bits = 8 * least / source.checkpoint.num_parameters
        raise UsageError(
            f"no file of {budget:,} bytes can be made of this model",
            why=f"with the smallest type for every matrix it has {least:,} bytes "
            f"({bits:.3f} bits per weight), metadata and tokenizer included",
            fix=f"--target-size {least} or more, or a --type or --tensor-type that is smaller yet",
        )


def allocate(
    source: Source, recipe: Recipe, windows: Tensor, run: RunDirectory, progress: Progress
) -> tuple[Source, Allocation]:
    """Choose the type of every matrix that the recipe does not pin.

    Args:
        source: The checkpoint, with the plan that a budget starts from.
        recipe: The budget, and the method that will quantize.
        windows: Calibration tokens, int64 [samples, length].
        run: Where measurements and the choice are kept.
        progress: Told about phases and blocks.

    Returns:
        The source with the chosen plan, and how it was found.

    Raises:
        UsageError: No choice fits.
        InputError: Activations are not finite.
    """
    check_budget(source, recipe)
    loaded = run.load(ALLOCATION)
    if loaded is None:
        found = _choose(source, recipe, windows, run, progress)
        run.store(ALLOCATION, {}, asdict(found))
    else:
        found = Allocation(**loaded[1])
    for line in found.summary():
        progress.note(line)
    return with_types(source, found.types), found


def with_types(source: Source, types: Mapping[str, str]) -> Source:
    """The source with other types for the matrices of its plan."""
    plan = TypePlan({name: types[name] for name in source.plan.types}, source.plan.replaced)
    return replace(source, plan=plan, file_type=plan.most(source.shapes))


def delivered_types(source: Source, promised: Mapping[str, Any]) -> dict[str, str]:
    """The types that a manifest says were chosen, by Hugging Face name.

    Args:
        source: The checkpoint.
        promised: The manifest's tensors by GGUF name.

    Raises:
        InputError: A matrix is missing there, or its type is none.
    """
    types = {}
    for name in source.plan.types:
        entry = promised.get(gguf_name(name))
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind not in (*WEIGHT_TYPES, *FLOAT_TYPES):
            raise InputError(
                f"the manifest does not say what type {gguf_name(name)} has", fix="deploy again"
            )
        types[name] = kind
    return types


def check_size(found: int, allocation: Allocation) -> None:
    """Compare a finished file with what was computed before.

    Raises:
        VerificationError: It has another size.
    """
    if found != allocation.size:
        raise VerificationError(
            f"the file has {found:,} bytes, not the {allocation.size:,} that types were chosen for"
        )


def _choose(
    source: Source, recipe: Recipe, windows: Tensor, run: RunDirectory, progress: Progress
) -> Allocation:
    sizes, types = file_sizes(source, recipe), choices(source, recipe)
    budget = budget_bytes(recipe, source.checkpoint.num_parameters)
    largest = _extreme(types, sizes, largest=True)
    if sizes.total(largest) <= budget:
        size = sizes.total(largest)
        note = f"the largest types for every matrix take {size:,} bytes: nothing was measured"
        return Allocation(largest, {}, budget, size, 0.0, 0.0, None, None, 0, [], [note])
    split = WindowSplit.of(windows)
    notes = []
    if not split.disjoint:
        notes.append("too few calibration windows to judge exchanges on others than were measured")
        progress.warning(notes[0])
    losses = Sensitivity(source, types, split, recipe, run, progress).measure()
    names = list(types)
    groups = [[Option(sizes.of(n, k), losses[n][k]) for k in types[n]] for n in names]
    solution = solve(groups, budget - sizes.fixed)
    chosen = {n: types[n][pick] for n, pick in zip(names, solution.chosen, strict=True)}
    swapped = _exchange(source, recipe, split.judged, chosen, losses, sizes, budget, run, progress)
    return Allocation(
        swapped.types,
        {name: losses[name][kind] for name, kind in swapped.types.items()},
        budget,
        sizes.total(swapped.types),
        solution.loss,
        solution.gap,
        swapped.before,
        swapped.after,
        swapped.tried,
        [{"types": dict(swap.moves), "kld": kld} for swap, kld in swapped.kept],
        notes,
    )


@torch.no_grad()
def _exchange(
    source: Source,
    recipe: Recipe,
    tokens: Tensor,
    chosen: dict[str, str],
    losses: Losses,
    sizes: FileSizes,
    budget: int,
    run: RunDirectory,
    progress: Progress,
) -> Swapped:
    judge = PlanJudge(
        source,
        CandidateStore(run),
        tokens,
        batch=recipe.calibration.batch,
        device=choose_device(recipe.device),
    )
    return improve(chosen, losses, sizes, budget, judge, progress)


def _extreme(
    types: Mapping[str, tuple[str, ...]], sizes: FileSizes, *, largest: bool
) -> dict[str, str]:
    """The largest or the smallest type of every matrix."""
    found = {}
    for name, kinds in types.items():
        by_size = sorted(kinds, key=partial(sizes.of, name))
        found[name] = by_size[-1] if largest else by_size[0]
    return found
