"""What transforms do to weight-only files: perplexity by transform and type, with and without
outliers.

Decoder weights are in the type, embedding and head in Q8_0; every model is quantized block by block
with the recipe's preset and evaluated in PyTorch with its dequantized weights, as llama-perplexity
does. *MB* counts all tensors: a rotation of the residual stream stores a tied head a second time,
so that its rows are not at equal bytes. Outliers: see `tests.outliers`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.progress import Progress, open_progress
from pipeline.quantization.formats import get_format
from pipeline.recipe_files import load_recipe
from pipeline.stages.calibrate import Texts, prepare_texts
from pipeline.stages.load import Source, open_source
from pipeline.stages.plan import TypePlan
from pipeline.stages.quantize import walk_settings
from pipeline.stages.transform import transform
from pipeline.stages.walk import Walk, choose_device, store_free
from runtimes.metrics import kl_divergence
from runtimes.torch_reference import TorchReference
from tests.outliers import inject

LEARNED = "rotate:matrix=learned,allow_untie=true"

ROWS: dict[str, tuple[str, ...]] = {
    "none": (),
    "fold": ("fold",),
    "permute magnitude": ("permute:spaces=inner+values+residual+heads",),
    "permute alike": ("permute:by=alike,spaces=inner+values+residual",),
    "permute mass": ("permute:by=mass,spaces=inner+values+residual",),
    "equalize range": ("equalize",),
    "equalize SmoothQuant": ("equalize:method=smoothquant",),
    "equalize AWQ": ("equalize:method=awq,points=10",),
    "R1": ("rotate:spaces=residual,allow_untie=true",),
    "R2": ("rotate:spaces=values",),
    "R1 R2": ("rotate:allow_untie=true",),
    "R1 R2 orthogonal": ("rotate:matrix=orthogonal,allow_untie=true",),
    "equalize, R1 R2": ("equalize", "rotate:allow_untie=true"),
    "equalize AWQ, permute": ("equalize:method=awq,points=10", "permute"),
    "R1 learned": (f"{LEARNED},spaces=residual",),
    "R1 learned, R2": (LEARNED,),
    "R1 network": (f"{LEARNED},objective=network,spaces=residual",),
    "R2 network": (f"{LEARNED},objective=network,spaces=values",),
    "R1 R2 network": (f"{LEARNED},objective=network",),
    "MagR 0.001": (),
    "MagR 0.01": (),
    "bias correction": (),
}
"""Transforms of each row."""

OPTIONS: dict[str, dict[str, Any]] = {
    "MagR 0.001": {"quantization.magr": 0.001},
    "MagR 0.01": {"quantization.magr": 0.01},
    "bias correction": {"quantization.bias_correction": True},
}
"""What a row changes of the recipe besides."""

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q2_0", "INT2_G32", "INT3_G32", "INT4_G32")


class Nowhere:
    """Keeps no parts of a run."""

    def load(self, name: str) -> None:
        """Nothing is there."""

    def store(self, name: str, tensors: Any, meta: Any) -> None:
        """Nothing is kept."""


def with_types(source: Source, kind: str) -> Source:
    """Decoder weights in one format of the solvers, whether a file can hold it or not."""
    types = {n: "Q8_0" if n in (EMBEDDING, HEAD) else kind for n in source.plan.types}
    return replace(source, plan=TypePlan(types, ()))


@torch.inference_mode()
def quantized_quality(recipe: Any, source: Source, texts: Texts) -> tuple[float, float]:
    """Perplexity of the quantized model in PyTorch, and its KL divergence from the checkpoint."""
    types = source.plan.types
    weights = {
        n: store_free("Q8_0", source.read(n)).dequantize() for n in (EMBEDDING, HEAD) if n in types
    }
    walk = Walk(source, weights[EMBEDDING], texts.calibration, walk_settings(recipe))
    for index in range(walk.n_blocks):
        for solved in walk.solve(index):
            weights |= {n: t.dequantize() for n, t in solved.stored.items()} | solved.biases
    return quality(source, weights, texts, recipe.device)


@torch.inference_mode()
def perplexity(
    source: Source, weights: Any, texts: Texts, device: str, linears: Any = None
) -> float:
    """Perplexity with some weights replaced: the second half of each chunk is scored."""
    return quality(source, weights, texts, device, linears)[0]


@torch.inference_mode()
def quality(
    source: Source, weights: Any, texts: Texts, device: str, linears: Any = None
) -> tuple[float, float]:
    """Perplexity, and mean KL divergence from the checkpoint as it was, in nats a token."""

    def read(name: str) -> torch.Tensor:
        found = weights.get(name)
        return source.read(name) if found is None else found

    place = choose_device(device)
    model = TorchReference(
        source.config,
        read,
        head=source.head,
        device=place,
        linears=linears,
        inner=source.inner,
    )
    reference = TorchReference(source.config, source.original, head=source.head, device=place)
    tokens = next(iter(texts.evaluation.values())).to(place)
    first = tokens.shape[1] // 2
    total = divergence = count = 0.0
    runs = (model.logits(tokens, first), reference.logits(tokens, first))
    for window, logits, before in zip(tokens, *runs, strict=True):
        wanted, wide = window[first + 1 :], logits.double().log_softmax(1)
        total -= float(wide.gather(1, wanted[:, None]).sum())
        divergence += float(kl_divergence(before, logits).sum())
        count += len(wanted)
    return math.exp(total / count), divergence / count


def megabytes(source: Source) -> float:
    """Of all tensors."""
    bits = 0.0
    for name, shape in source.shapes.items():
        kind = source.plan.types.get(name)
        bits += math.prod(shape) * (32 if kind is None else get_format(kind).bits_per_weight)
    return bits / 8e6


def options_of(
    model: str,
    calibration: str | None,
    evaluation: str | None,
    samples: int,
    chunks: int,
    device: str,
    transforms: tuple[str, ...],
) -> dict[str, Any]:
    """Recipe values of one cell; types are set apart, see `with_types`."""
    return {
        "model": model,
        "calibration.source": calibration,
        "calibration.samples": samples,
        "evaluation.source": evaluation,
        "evaluation.chunks": chunks,
        "device": device,
        "type": "Q8_0",
        "transforms": transforms,
    }


def opened(options: dict[str, Any], preset: str) -> tuple[Any, Source]:
    """Recipe and source."""
    recipe = load_recipe(preset, options={k: v for k, v in options.items() if v is not None}).recipe
    return recipe, open_source(recipe, allow_pickle=False)


def measure(
    model: str,
    calibration: str | None,
    evaluation: str | None,
    out: Path,
    *,
    preset: str,
    samples: int,
    chunks: int,
    device: str,
    types: Sequence[str],
    rows: Sequence[str],
    outliers: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """Fill the table; figures that `out` already holds are kept, so that a run can be continued.

    Several processes may share a GPU, each with rows and a file of its own; `merged` puts their
    files together. `settings` are further recipe values.
    """
    done = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch, open_progress("quiet") as progress:
        folders = {"without": model}
        if "with" in outliers:
            folders["with"] = str(inject(Path(model), Path(scratch) / "outliers"))
        for which in outliers:
            for row in rows:
                place = (folders[which], calibration, evaluation)
                options = options_of(*place, samples, chunks, device, ROWS[row])
                options |= {**OPTIONS.get(row, {}), **settings}
                recipe, opened_source = opened(options, preset)
                texts = prepare_texts(recipe, opened_source)
                if f"{which} | full precision" not in done:
                    figure = perplexity(opened_source, {}, texts, device)
                    done[f"{which} | full precision"] = {"ppl": figure}
                for kind in types:
                    key = f"{which} | {row} | {kind}"
                    if key in done:
                        continue
                    done[key] = figures = cell(recipe, opened_source, kind, texts, progress)
                    print(f"{key}: {figures}", flush=True)
                    out.write_text(json.dumps(done, indent=1), encoding="utf-8")
    print(render(done, types, rows))


def cell(
    recipe: Any, source: Source, kind: str, texts: Texts, progress: Progress
) -> dict[str, Any]:
    """Figures of one row and type; seconds of the transforms, and of everything."""
    begun = time.monotonic()
    source = with_types(source, kind)
    source = transform(recipe, source, texts.calibration, Nowhere(), progress)
    rewritten = time.monotonic() - begun
    ppl, kld = quantized_quality(recipe, source, texts)
    return {
        "ppl": ppl,
        "kld": kld,
        "MB": megabytes(source),
        "transform seconds": rewritten,
        "seconds": time.monotonic() - begun,
        "notes": [note for note in source.rewrite_notes if "learned" in note],
    }


def merged(files: Sequence[Path]) -> str:
    """The tables of the figures of several processes; of figures that two have, the later file's.

    Raises:
        ValueError: Their full precision differs: they are not about one model and text.
    """
    done: dict[str, Any] = {}
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        for key in found:
            full = key.endswith("full precision") and key in done
            if full and not math.isclose(done[key]["ppl"], found[key]["ppl"], rel_tol=1e-4):
                raise ValueError(f"{file}: {key} is {found[key]['ppl']}, not {done[key]['ppl']}")
        done |= found
    keys = [key.split(" | ") for key in done if key.count(" | ") == 2]
    rows = [row for row in ROWS if any(key[1] == row for key in keys)]
    types = [kind for kind in TYPES if any(key[2] == kind for key in keys)]
    types += sorted({key[2] for key in keys} - set(types))
    return render(done, types, rows)


def render(done: dict[str, Any], types: Sequence[str], rows: Sequence[str]) -> str:
    """One Markdown table without and one with outliers."""
    lines = []
    for which in ("without", "with"):
        full = done.get(f"{which} | full precision")
        if full is None:
            continue
        lines += ["", f"{which} outliers, full precision {full['ppl']:.2f}", ""]
        lines += [f"| transforms | {' | '.join(f'{t} | KLD | MB' for t in types)} |"]
        lines += ["| --- " * (1 + 3 * len(types)) + "|"]
        for row in rows:
            cells = [done.get(f"{which} | {row} | {kind}") for kind in types]
            shown = [
                f"{c['ppl']:.2f} | {c['kld']:.4f} | {c['MB']:.2f}" if c else " |  | " for c in cells
            ]
            lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)
