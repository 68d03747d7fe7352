"""What a budget buys at the sizes of llama-quantize's mixes, without quantizing a model to the end.

All plans are judged alike: candidates of all their types are put into the float model together, and
the KL divergence is measured on calibration windows that nothing was measured or solved on. The
estimate beside it is the sum of the losses that the knapsack sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.allocation.knapsack import Option, solve
from pipeline.progress import open_progress
from pipeline.recipe_files import load_recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.calibrate import prepare_texts
from pipeline.stages.candidates import CandidateStore, choices
from pipeline.stages.export import file_sizes
from pipeline.stages.load import open_source
from pipeline.stages.plan import plan_types
from pipeline.stages.sensitivity import Sensitivity, WindowSplit
from pipeline.stages.swaps import PlanJudge

HEAD = "| size of | MB | KLD mix, estimated | KLD mix | KLD budget, estimated | KLD budget |"


def measure(
    model: str | None,
    calibration: str | None,
    evaluation: str | None,
    folder: Path,
    types: Sequence[str],
    preset: str,
) -> None:
    """Measure once, then print a row a mix: its own plan, and the plan of a budget of its size.

    Args:
        model: Checkpoint; None for the demo model.
        calibration: Text.
        evaluation: Text, only read to be refused where `deploy` would.
        folder: Run directory; an interrupted measurement continues.
        types: Mixes of which all types are candidates.
        preset: Of the recipe.
    """
    given = {
        "model": model,
        "calibration.source": calibration,
        "evaluation.source": evaluation,
    }
    options = {key: value for key, value in given.items() if value is not None}
    recipe = load_recipe(preset, options=options).recipe
    source = open_source(recipe, allow_pickle=False)
    candidates, sizes = choices(source, recipe), file_sizes(source, recipe)
    split = WindowSplit.of(prepare_texts(recipe, source).calibration)
    with open_progress("plain") as progress, RunDirectory(folder, {**options, "p": preset}) as run:
        losses = Sensitivity(source, candidates, split, recipe, run, progress).measure()
        with torch.no_grad():
            judge = PlanJudge(
                source,
                CandidateStore(run),
                split.judged,
                batch=recipe.calibration.batch,
                device=torch.device("cpu"),
            )
            print(HEAD)
            for mix in types:
                fixed = plan_types(
                    source.checkpoint, load_recipe(preset, options=options | {"type": mix}).recipe
                ).types
                groups = [
                    [Option(sizes.of(n, k), losses[n][k]) for k in kinds]
                    for n, kinds in candidates.items()
                ]
                size = sizes.total(fixed)
                found = solve(groups, size - sizes.fixed)
                picks = zip(candidates.items(), found.chosen, strict=True)
                bought = {name: kinds[i] for (name, kinds), i in picks}
                cells = [f"{size / 1e6:.2f}"]
                for plan in (fixed, bought):
                    cells += [
                        f"{sum(losses[n][k] for n, k in plan.items()):.4f}",
                        f"{judge.judge(plan)[0]:.4f}",
                    ]
                print(f"| {mix} | {' | '.join(cells)} |", flush=True)
