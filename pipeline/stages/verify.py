"""The parity ladder: is the file what the solver decided, and does the runtime agree?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.architectures.base import EMBEDDING, HEAD, is_gain
from pipeline.errors import UnsupportedError
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.report import Gate, Quality
from pipeline.stages.calibrate import Texts
from pipeline.stages.evaluate import Logits, Pair, evaluate
from pipeline.stages.export import export_twin
from pipeline.stages.file_gates import bytes_gates, tokens_gates
from pipeline.stages.kernel_gates import CLAIM as KERNELS_CLAIM
from pipeline.stages.kernel_gates import kernel_gates
from pipeline.stages.limits import limit_gate
from pipeline.stages.load import Source
from runtimes import llamacpp
from runtimes.ggml_activations import activation_rounding, round_q8_k
from runtimes.ggml_emulator import GGMLEmulator
from runtimes.gguf_weights import GGUFWeights
from runtimes.metrics import Comparison, Protocol
from runtimes.torch_reference import TorchReference
from runtimes.trace import TRACED_TOKENS, Trace

FULL, TWIN = "full precision", "torch twin"
EMULATOR, EMULATOR_FLOAT = "ggml emulator", "ggml emulator, float"
LLAMA, LLAMA_FLOAT, LLAMA_DEFAULT = "llama.cpp", "llama.cpp, float twin", "llama.cpp, defaults"

TWIN_PAIRS: tuple[Pair, ...] = ((TWIN, EMULATOR_FLOAT), (TWIN, LLAMA_FLOAT))
QUALITY_PAIRS: tuple[Pair, ...] = (
    (TWIN, EMULATOR),
    (TWIN, LLAMA),
    (FULL, TWIN),
    (FULL, EMULATOR),
    (FULL, LLAMA),
)
DEFAULT_PAIRS: tuple[Pair, ...] = ((FULL, LLAMA_DEFAULT),)

DEFAULT_WINDOWS = 10
"""Evaluation windows of the figure under llama.cpp's default settings, which is no gate."""

TWIN_WINDOWS = 8
"""Evaluation windows of the twin gate, whose claim is exact and needs no statistics."""

COARSE_ROUNDING = {"lnppl": 2.5, "kld": 5.0}
"""Multiples of the limits of ``deployed`` where decoder weights are K-quants: their inputs are
rounded in blocks of 256 and not of 32 (Q8_K), which costs about that much more, in the emulator as
in llama.cpp."""

CLAIMS = {
    "twin": "the graph on the file's dequantized weights is PyTorch's",
    "kernels": KERNELS_CLAIM,
    "deployed": "on the file, it is PyTorch with the dequantized weights",
}


@dataclass(frozen=True)
class Ladder:
    """What climbing the ladder found."""

    gates: tuple[Gate, ...]
    qualities: tuple[Quality, ...]


def climb(
    path: Path,
    promised: Mapping[str, Any],
    recipe: Recipe,
    source: Source,
    texts: Texts,
    scratch: Path,
    progress: Progress,
) -> Ladder:
    """Check a GGUF file from its bytes up to its quality.

    Args:
        path: The file.
        promised: Type and digest of each quantized tensor, from `stages.export.export`.
        recipe: Limits of the gates, and whether llama.cpp must run.
        source: The full precision model.
        texts: Evaluation text.
        scratch: Folder for the float twin, which is removed again.
        progress: A block is a model.

    Raises:
        UnsupportedError: llama.cpp is required and not installed.
    """
    stock = wants_llamacpp(recipe)
    with ExitStack() as stack:
        weights = GGUFWeights(path, source.checkpoint.config)
        stack.callback(weights.close)
        gates = bytes_gates(weights, promised, source)
        gates += tokens_gates(path, source, texts.sources[1].text, stock)
        if any(gate.status == "red" for gate in gates):
            return Ladder(tuple(gates), ())
        engines = _open_engines(path, weights, source, recipe, scratch if stock else None, stack)
        window = next(iter(texts.evaluation.values()))[0]
        kernels = _kernel_gates(engines.traces, weights, source, window, recipe)
        found: dict[Protocol, dict[Pair, Comparison]] = {}
        for protocol, tokens in texts.evaluation.items():
            pairs = QUALITY_PAIRS if not found else ((FULL, TWIN),)
            found[protocol] = evaluate(engines.models, pairs, tokens, protocol, progress)
        protocol, tokens = next(iter(texts.evaluation.items()))
        twins = evaluate(engines.models, TWIN_PAIRS, tokens[:TWIN_WINDOWS], protocol, progress)
        few = tokens[:DEFAULT_WINDOWS]
        defaults = evaluate(engines.models, DEFAULT_PAIRS, few, protocol, progress)
    first = next(iter(found.values()))
    gates += _comparison_gates("twin", twins, recipe, stock)
    gates += kernels
    gates += _comparison_gates("deployed", first, recipe, stock, coarse=_rounds_coarsely(source))
    qualities = tuple(
        quality_of(protocol, candidate, comparison)
        for protocol, comparisons in found.items()
        for (reference, candidate), comparison in comparisons.items()
        if reference == FULL
    ) + tuple(
        quality_of(protocol, f"{candidate}, first {len(few)} chunks", comparison)
        for (_, candidate), comparison in defaults.items()
    )
    gates.append(_quality_gate(first, recipe))
    return Ladder(tuple(gates), qualities)


def _rounds_coarsely(source: Source) -> bool:
    """Whether a decoder matrix has its inputs rounded in blocks of 256."""
    kinds = {k for n, k in source.plan.types.items() if n not in (EMBEDDING, HEAD)}
    return any(activation_rounding(kind) is round_q8_k for kind in kinds)


def wants_llamacpp(recipe: Recipe) -> bool:
    """Whether the ladder is to be climbed in stock llama.cpp too.

    Raises:
        UnsupportedError: It is required and not installed.
    """
    if recipe.runtime.llamacpp == "require" and not llamacpp.available():
        raise UnsupportedError(
            "llama.cpp is required and not installed",
            fix="pip install 'piso-deploy[llamacpp]', or drop runtime.llamacpp = \"require\"",
        )
    return recipe.runtime.llamacpp != "off" and llamacpp.available()


@dataclass(frozen=True)
class _Engines:
    models: dict[str, Logits]
    traces: dict[str, Trace]


def _open_engines(
    path: Path,
    weights: GGUFWeights,
    source: Source,
    recipe: Recipe,
    scratch: Path | None,
    stack: ExitStack,
) -> _Engines:
    """PyTorch and the emulator; with a folder for its float twin, stock llama.cpp too."""

    def read(name: str) -> Tensor:
        """The file's matrices, corrected biases and tuned gains, and what else the checkpoint has:
        the twin vouches for the rest."""
        corrected = recipe.quantization.bias_correction and name.endswith(".bias")
        tuned = source.tuned and is_gain(name)
        own = corrected or tuned or name in source.plan.types
        return weights.read(name) if own else source.read(name)

    head = source.head
    emulator = stack.enter_context(GGMLEmulator(path))
    floating = stack.enter_context(GGMLEmulator(path, round_activations=False))
    models: dict[str, Logits] = {
        FULL: TorchReference(source.config, source.original, head=head).logits,
        TWIN: TorchReference(source.config, read, head=head, inner=source.inner).logits,
        EMULATOR: emulator.logits,
        EMULATOR_FLOAT: floating.logits,
    }
    traces: dict[str, Trace] = {EMULATOR: emulator.trace}
    if scratch is None:
        return _Engines(models, traces)
    twin = scratch / "float-twin.gguf"
    stack.callback(lambda: twin.unlink(missing_ok=True))
    export_twin(twin, weights.read, source)
    runners = _stock_runners(path, twin, recipe, stack)
    names = (LLAMA, LLAMA_FLOAT, LLAMA_DEFAULT)
    models |= {n: r.logits for n, r in zip(names, runners, strict=True)}
    return _Engines(models, {**traces, LLAMA: runners[0].trace})


def _kernel_gates(
    traces: Mapping[str, Trace],
    weights: GGUFWeights,
    source: Source,
    window: Tensor,
    recipe: Recipe,
) -> list[Gate]:
    rounded = {name: weights.linear(name) for name in source.plan.types}
    reference = TorchReference(source.config, weights.read, head=source.head, linears=rounded)
    gates = kernel_gates(traces, reference, window[:TRACED_TOKENS], recipe)
    return gates if LLAMA in traces else [*gates, _not_run("kernels", LLAMA, recipe)]


def _stock_runners(
    path: Path, twin: Path, recipe: Recipe, stack: ExitStack
) -> list[llamacpp.LlamaCpp]:
    limit = float(recipe.runtime.time_limit_s)
    runners = [
        llamacpp.LlamaCpp(path, mode="exact", time_limit=limit),
        llamacpp.LlamaCpp(twin, mode="exact", time_limit=limit),
        llamacpp.LlamaCpp(path, mode="default", time_limit=limit),
    ]
    for runner in runners:
        stack.callback(runner.close)
    return runners


def _comparison_gates(
    level: str,
    found: Mapping[Pair, Comparison],
    recipe: Recipe,
    stock: bool,
    *,
    coarse: bool = False,
) -> list[Gate]:
    """The rungs ``twin`` and ``deployed``, which compare logits with those of the torch twin."""
    limits = recipe.gates
    wider = COARSE_ROUNDING if coarse else dict.fromkeys(COARSE_ROUNDING, 1.0)
    ran = {EMULATOR: EMULATOR_FLOAT, LLAMA: LLAMA_FLOAT} if level == "twin" else {}
    gates = []
    for runtime in (EMULATOR, LLAMA):
        if runtime == LLAMA and not stock:
            gates.append(_not_run(level, runtime, recipe))
            continue
        comparison = found[TWIN, ran.get(runtime, runtime)]
        difference, divergence = abs(comparison.delta_nll), comparison.kld_mean
        checks = {
            "twin": [("abs(d ln ppl)", difference, limits.twin)],
            "deployed": [
                ("abs(d ln ppl)", difference, limits.deployed_lnppl * wider["lnppl"]),
                ("mean KLD", divergence, limits.deployed_kld * wider["kld"]),
            ],
        }[level]
        gates += [limit_gate(level, CLAIMS[level], runtime, *check) for check in checks]
    return gates


def _not_run(level: str, runtime: str, recipe: Recipe) -> Gate:
    off = recipe.runtime.llamacpp == "off"
    detail = "switched off" if off else "not installed: pip install 'piso-deploy[llamacpp]'"
    return Gate(level, CLAIMS[level], runtime, None, "", "not run", detail)


def _quality_gate(found: Mapping[Pair, Comparison], recipe: Recipe) -> Gate:
    """Quantized against full precision, in the runtime that is closest to the user."""
    runtime = next(n for n in (LLAMA, EMULATOR) if (FULL, n) in found)
    return quality_gate(runtime, found[FULL, runtime].delta_nll, recipe)


def quality_gate(runtime: str, figure: float, recipe: Recipe) -> Gate:
    """The verdict on ``ln(ppl / ppl)`` of the quantized model, which the recipe may limit."""
    limit = recipe.gates.max_ln_ppl_increase
    return Gate(
        level="quality",
        claim="quantized against full precision, d ln ppl",
        runtime=runtime,
        figure=figure,
        limit="report only" if limit is None else f"d ln ppl < {limit:g}",
        status="green" if limit is None or figure < limit else "red",
    )


def quality_of(protocol: Protocol, runtime: str, comparison: Comparison) -> Quality:
    """A row of the quality table: quantized in a runtime against full precision."""
    return Quality(
        protocol=protocol.name,
        runtime=runtime,
        reference_ppl=comparison.reference.ppl,
        reference_se=comparison.reference.stderr,
        ppl=comparison.candidate.ppl,
        se=comparison.candidate.stderr,
        d_ln_ppl=comparison.delta_nll,
        d_ln_ppl_se=comparison.delta_stderr,
        kld_mean=comparison.kld_mean,
        kld_p999=comparison.kld_p999,
        top1=comparison.top1_agreement,
    )
