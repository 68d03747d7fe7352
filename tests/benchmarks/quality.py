"""Layer loss and perplexity of every method and scale rule on one model.

Layer loss is measured on frozen moments: the inputs of some blocks in the float model, X, and in a
model whose blocks before are already quantized (GPTQ with PiSO scales, 3 bits, groups of 32), Xq.
All methods see the same ones, and all are judged by the same figure, the share of the output's
energy that is lost, ``|X W' - Xq V'|^2 / |X W'|^2`` averaged over sites. Perplexity is that of a
whole quantized model, each block calibrated behind the ones before it, in PyTorch with the
dequantized weights: the second half of each window of 512 tokens, as in llama-perplexity.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.calibration.streams import MomentOptions
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import LayerOptions, quantize_layer
from pipeline.quantization.objective import LayerObjective
from pipeline.recipe_files import load_recipe
from pipeline.stages.calibrate import Texts, prepare_texts
from pipeline.stages.load import Source, open_source
from pipeline.stages.mismatch_share import solve_with_estimate
from pipeline.stages.plan import TypePlan
from pipeline.stages.walk import Walk, WalkSettings, choose_device, store_free
from runtimes.torch_reference import TorchReference
from tests.benchmarks.variants import FORMATS, Variant, variants

DAMPING = 0.01
FROZEN_PREFIX = ("INT3_G32", LayerOptions(mismatch=0.0))


@dataclass(frozen=True)
class FrozenSite:
    """One site's moments and float weights, for layer losses that compare across methods."""

    weights: list[Tensor]
    moments: object
    objective: LayerObjective
    energy: float


class Bench:
    """A model, its texts, and everything that is computed once."""

    def __init__(self, source: Source, texts: Texts, device: str, batch: int) -> None:
        self.source, self.batch = source, batch
        self.device = choose_device(device)
        self.calibration = texts.calibration
        self.evaluation = next(iter(texts.evaluation.values()))
        types = {n: "Q8_0" for n in (EMBEDDING, HEAD) if n in source.plan.types}
        self.tables = {n: store_free("Q8_0", source.read(n)).dequantize() for n in types}
        self.frozen: list[FrozenSite] = []

    def typed(self, name: str) -> Source:
        """The source with every decoder matrix in one format."""
        types = {n: name for n in self.source.plan.types if n not in (EMBEDDING, HEAD)}
        return replace(self.source, plan=TypePlan(types, ()))

    def walk(self, variant: Variant, fmt: str) -> Walk:
        """A walk with a variant's options."""
        settings = WalkSettings(
            options=variant.options,
            damping=DAMPING,
            batch=self.batch,
            device=str(self.device),
            mismatch_estimate=variant.estimate,
        )
        return Walk(self.typed(fmt), self.tables[EMBEDDING], self.calibration, settings)

    @torch.inference_mode()
    def freeze(self, blocks: tuple[int, ...]) -> None:
        """Collect the moments that layer losses are measured on."""
        fmt, options = FROZEN_PREFIX
        walk = self.walk(Variant("", "", replace(options, rounding="gptq", mismatch=1.0)), fmt)
        walk._moment_options = MomentOptions(halves=True)
        collected: list[FrozenSite] = []
        inner = walk._solve_site

        def solve_site(index, site, linears, block, moments):  # type: ignore[no-untyped-def]
            if index in blocks:
                weights = [block.linear(n).weight.clone() for n in linears]
                solving = moments.solving
                objective = LayerObjective.from_moments(
                    solving.hessian, solving.cross, damping=DAMPING
                )
                W = torch.cat(weights).double()
                target = objective.target(W)
                # |XW'|^2 is not in the moments; the energy of the reachable output stands for it.
                energy = float(((target @ objective.hessian) * target).sum())
                collected.append(FrozenSite(weights, moments, objective, energy))
            return inner(index, site, linears, block, moments)

        walk._solve_site = solve_site  # type: ignore[method-assign]
        for index in range(max(blocks) + 1):
            for _ in walk.solve(index):
                pass
        self.frozen = collected

    @torch.inference_mode()
    def layer_loss(self, variant: Variant, fmt: str) -> float:
        """Mean share of the reachable output energy that is lost, over the frozen sites."""
        shares = []
        for site in self.frozen:
            result = solve_with_estimate(
                site.weights,
                site.moments,  # type: ignore[arg-type]
                site.objective,
                lambda stacked, mismatch, site=site: quantize_layer(
                    stacked, site.objective, get_format(fmt), variant.options, None, mismatch
                ),
                variant.estimate,
                variant.options.mismatch,
                DAMPING,
            )
            W = torch.cat(site.weights)
            values = result.quantized.dequantize()
            lost = site.objective.loss(values, site.objective.target(W)).sum()
            shares.append(float(lost) / site.energy)
        return sum(shares) / len(shares)

    @torch.inference_mode()
    def perplexity(self, weights: Mapping[str, Tensor]) -> tuple[float, float]:
        """Perplexity with some weights replaced, and the mean negative log-likelihood."""

        def read(name: str) -> Tensor:
            found = weights.get(name)
            if found is None and name == HEAD:
                found = weights.get(EMBEDDING)
            return self.source.read(name) if found is None else found

        model = TorchReference(
            self.source.config, read, head=self.source.head, device=self.device, batch=self.batch
        )
        tokens = self.evaluation.to(self.device)
        first = tokens.shape[1] // 2
        total = count = 0.0
        for window, logits in zip(tokens, model.logits(tokens, first), strict=True):
            wanted = window[first + 1 :]
            wide = logits.double()
            picked = wide.gather(1, wanted[:, None])[:, 0]
            total += float((wide.logsumexp(1) - picked).sum())
            count += len(wanted)
        return math.exp(total / count), total / count

    @torch.inference_mode()
    def model(self, variant: Variant, fmt: str) -> dict[str, Tensor]:
        """The dequantized weights of a whole model."""
        weights = dict(self.tables)
        walk = self.walk(variant, fmt)
        for index in range(walk.n_blocks):
            for solved in walk.solve(index):
                weights |= {n: t.dequantize() for n, t in solved.stored.items()}
        return weights


def measure(
    model: str | None,
    calibration: str | None,
    evaluation: str | None,
    out: Path,
    *,
    samples: int,
    seqlen: int,
    device: str,
    batch: int,
    only: str,
    seconds: float,
) -> None:
    """Fill the table; figures that `out` already holds are kept, so that a run can be continued."""
    started = time.monotonic()
    options = {
        "model": model,
        "calibration.source": calibration,
        "evaluation.source": evaluation,
        "calibration.samples": samples,
        "calibration.seqlen": seqlen,
    }
    recipe = load_recipe(options={k: v for k, v in options.items() if v is not None}).recipe
    source = open_source(recipe, allow_pickle=False)
    bench = Bench(source, prepare_texts(recipe, source), device, batch)
    done = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    done["full precision"] = {"ppl": bench.perplexity({})[0]}
    layers = int(source.config.num_hidden_layers)
    bench.freeze(tuple(sorted({0, layers // 2, layers - 1})))
    cells = [(fmt, variant) for fmt in FORMATS for variant in variants()]
    cells.sort(key=lambda cell: "look-ahead" in cell[1].scales)  # the slowest last
    for fmt, variant in cells:
        key = f"{fmt} | {variant.name}"
        if key in done or only not in key:
            continue
        if time.monotonic() - started > seconds:
            return
        begun = time.monotonic()
        loss = bench.layer_loss(variant, fmt)
        ppl = bench.perplexity(bench.model(variant, fmt))[0]
        done[key] = {"loss": loss, "ppl": ppl, "seconds": time.monotonic() - begun}
        print(f"{key}: loss {loss:.5f} ppl {ppl:.3f} {done[key]['seconds']:.1f} s", flush=True)
        out.write_text(json.dumps(done, indent=1), encoding="utf-8")
