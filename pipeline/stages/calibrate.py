"""From texts to token windows, for calibration and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.calibration.batches import (
    other_windows,
    prepended_bos,
    sample_windows,
    tokenize,
)
from pipeline.calibration.streams import held_out_batches
from pipeline.calibration.text import TextSource, load_texts
from pipeline.recipe import Recipe
from pipeline.stages.load import Source
from runtimes.metrics import Protocol, windows

CHARACTERS_PER_TOKEN = 16
"""Text to draw from: about four times what the samples fill, so that they are spread."""

LEAST_CHARACTERS = 3_000_000
"""The same for all presets, so that they are evaluated on the same part of a file."""


HELD_OUT = 16
"""Windows that tuned parameters are judged on."""


@dataclass(frozen=True)
class Texts:
    """Token windows and where they are from.

    Attributes:
        calibration: int64 [samples, length].
        evaluation: Windows of llama-perplexity's protocol and of the GPTQ papers', int64
            [windows, context].
        sources: The calibration and the evaluation text.
        counts: How much less text there is than the recipe asks for, by kind.
        tuning: Calibration text to tune on, int64 [windows, length]; None if nothing is tuned.
    """

    calibration: Tensor
    evaluation: dict[Protocol, Tensor]
    sources: tuple[TextSource, TextSource]
    counts: dict[str, int]
    tuning: Tensor | None = None

    def warnings(self) -> list[str]:
        """What is different from what the recipe asks for, in words."""
        return [f"{count} {what}" for what, count in self.counts.items() if count]

    def describe(self) -> dict[str, Any]:
        """What the manifest says about the texts."""
        return {
            source.split: {
                "name": source.name,
                "part": source.part,
                "truncated": source.truncated,
                "sha256": source.sha256,
            }
            for source in self.sources
        } | {"samples": len(self.calibration)}


def prepare_texts(recipe: Recipe, source: Source) -> Texts:
    """Load and tokenize calibration and evaluation text.

    Raises:
        InputError: A text cannot be had or is too short.
    """
    samples, seqlen = recipe.calibration.samples, recipe.calibration.seqlen
    wanted = samples * seqlen
    limit = max(CHARACTERS_PER_TOKEN * wanted, LEAST_CHARACTERS)
    texts = load_texts(source.calibration, recipe.evaluation.source, limit=limit)
    bos = prepended_bos(source.tokenizer)
    context = int(source.config.max_position_embeddings)
    tokens, length = tokenize(source.tokenizer, texts[0].text), min(seqlen, context)
    drawn = sample_windows(tokens, samples=samples, length=length, seed=recipe.seed, bos_id=bos)
    tuning, seen = None, 0
    if recipe.tuning.steps:
        tuning, seen = _tuning_windows(recipe, tokens, drawn.tokens, bos)
    ids = tokenize(source.tokenizer, texts[1].text)
    if bos is not None:
        ids = torch.cat([torch.tensor([bos]), ids])
    evaluation = _evaluation_windows(recipe, ids.tolist(), bos, context)
    chunks = len(next(iter(evaluation.values())))
    counts = {
        "calibration samples missing": drawn.dropped,
        "calibration tokens beyond the model's context cut from each sample": max(
            0, seqlen - context
        ),
        "evaluation tokens beyond the model's context cut from each chunk": max(
            0, recipe.evaluation.context - context
        ),
        "evaluation chunks missing": recipe.evaluation.chunks - chunks,
        **({"tuning windows that solvers have seen": seen} if recipe.tuning.steps else {}),
    }
    return Texts(drawn.tokens, evaluation, texts, counts, tuning)


def _tuning_windows(
    recipe: Recipe, tokens: Tensor, used: Tensor, bos: int | None
) -> tuple[Tensor, int]:
    """Windows to judge on and for every step: of text that calibration does not use as far as there
    is any, then those that solvers do not see, then the others; and how many these are."""
    wanted = HELD_OUT + recipe.tuning.steps * recipe.tuning.batch
    others = other_windows(tokens, used, samples=wanted, seed=recipe.seed, bos_id=bos)
    batch = recipe.calibration.batch
    apart = held_out_batches(-(-len(used) // batch), recipe.calibration.held_out)
    kept = torch.isin(torch.arange(len(used)) // batch, torch.tensor(apart))
    found = torch.cat([others, used[kept], used[~kept]])[:wanted]
    return found, max(0, len(found) - len(others) - int(kept.sum()))


def _evaluation_windows(
    recipe: Recipe, ids: list[int], bos: int | None, context: int
) -> dict[Protocol, Tensor]:
    """Windows of llama-perplexity's protocol, then of the GPTQ papers'.

    The papers' windows are cut to the model's context, and as many of them are taken as hold the
    tokens of the first protocol. A text that does not fill one is left out.
    """
    evaluation = recipe.evaluation
    first = Protocol.llama_perplexity(min(evaluation.context, context))
    chosen = {first: windows(ids, first, bos, evaluation.chunks)}
    second = Protocol.gptq_windows(min(evaluation.gptq_context, context))
    if len(ids) >= second.context:
        limit = max(1, evaluation.chunks * first.context // second.context)
        chosen[second] = windows(ids, second, bos, limit)
    return chosen
