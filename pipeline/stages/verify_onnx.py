"""The parity ladder of an ONNX file: from its bytes to ONNX Runtime's default products."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.onnx import OnnxFile, read_onnx, storage_of
from exporters.onnx.integers import OUTPUTS_AT_2_BITS, Storage
from pipeline.architectures.base import EMBEDDING, HEAD, is_gain
from pipeline.errors import InputError
from pipeline.figures import size
from pipeline.progress import Progress
from pipeline.quantization.formats import get_format
from pipeline.recipe import Recipe
from pipeline.report import Gate
from pipeline.stages.calibrate import Texts
from pipeline.stages.evaluate import Logits, Pair, evaluate
from pipeline.stages.export_onnx import promise
from pipeline.stages.file_gates import differing_texts, identity_gate, tokenizer_texts
from pipeline.stages.limits import limit_gate
from pipeline.stages.load import Source
from pipeline.stages.stored import FLOAT_TYPES
from pipeline.stages.verify import (
    CLAIMS,
    FULL,
    TWIN,
    TWIN_WINDOWS,
    Ladder,
    quality_gate,
    quality_of,
)
from pipeline.transforms.online import kronecker_pair
from runtimes.metrics import Comparison, Protocol
from runtimes.onnxruntime import Census, Mode, OnnxRuntime
from runtimes.onnxruntime_speed import measure
from runtimes.torch_reference import TorchReference

EXACT, DEFAULT = "ONNX Runtime (exact)", "ONNX Runtime (default)"
MODES: dict[str, Mode] = {EXACT: "exact", DEFAULT: "default"}

PAIRS: tuple[Pair, ...] = ((TWIN, DEFAULT), (FULL, TWIN), (FULL, DEFAULT))

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 20, 32, 64
"""Texts that are continued greedily, and tokens of each."""


def climb_onnx(
    path: Path,
    promised: Mapping[str, Any],
    recipe: Recipe,
    source: Source,
    texts: Texts,
    progress: Progress,
) -> Ladder:
    """Check an ONNX file from its bytes up to its quality.

    Args:
        path: The graph; weights and tokenizer lie beside it.
        promised: Type and digests of each tensor, from `stages.export_onnx.export_onnx`.
        recipe: Limits of the gates.
        source: The full precision model.
        texts: Evaluation text.
        progress: A block is a model.

    Raises:
        InputError: The file cannot be read.
        VerificationError: ONNX Runtime refused it or failed.
    """
    file = read_onnx(path)
    with ExitStack() as stack:
        runners = {n: stack.enter_context(OnnxRuntime(path, mode=m)) for n, m in MODES.items()}
        gates = [_bytes_gate(file, promised, source)]
        gates.append(_tokens_gate(runners[EXACT], source, texts))
        gates += [_census_gate(name, runner.census(), source) for name, runner in runners.items()]
        if any(gate.status == "red" for gate in gates):
            return Ladder(tuple(gates), ())
        reader = _reader(file, source)
        twin = TorchReference(source.config, reader, head=source.head, inner=source.inner)
        models: dict[str, Logits] = {
            FULL: TorchReference(source.config, source.original, head=source.head).logits,
            TWIN: twin.logits,
            **{name: runner.logits for name, runner in runners.items()},
        }
        found: dict[Protocol, dict[Pair, Comparison]] = {}
        for protocol, tokens in texts.evaluation.items():
            pairs = PAIRS if not found else ((FULL, TWIN),)
            found[protocol] = evaluate(models, pairs, tokens, protocol, progress)
        protocol, tokens = next(iter(texts.evaluation.items()))
        exact = evaluate(models, ((TWIN, EXACT),), tokens[:TWIN_WINDOWS], protocol, progress)
        gates += _twin_gates(exact[TWIN, EXACT], recipe)
        gates.append(greedy_gate(runners[EXACT], twin, prompts_of(tokens), recipe))
    first = next(iter(found.values()))
    gates.append(_deployed_gate(path, first[TWIN, DEFAULT], tokens.shape[1], recipe))
    gates.append(quality_gate(DEFAULT, first[FULL, DEFAULT].delta_nll, recipe))
    qualities = tuple(
        quality_of(protocol, candidate, comparison)
        for protocol, comparisons in found.items()
        for (reference, candidate), comparison in comparisons.items()
        if reference == FULL
    )
    return Ladder(tuple(gates), qualities)


def _reader(file: OnnxFile, source: Source) -> Any:
    """Weights, biases and tuned gains of the file, by Hugging Face name; the checkpoint's norms
    else, for which the twin gate vouches."""

    def read(name: str) -> Tensor:
        own = name.endswith(".bias") or (source.tuned and is_gain(name))
        if name not in source.plan.types and not own:
            return source.read(name)
        if file.types.get(name) in FLOAT_TYPES:
            return torch.from_numpy(file.floats(name))
        return file.quantized(name).dequantize()

    return read


def _bytes_gate(file: OnnxFile, promised: Mapping[str, Any], source: Source) -> Gate:
    """Codes, scales and floats of the file against what the solver decided."""
    expected = set(source.shapes)
    odd = sorted((expected ^ set(promised)) | (expected ^ set(file.types)))
    differing = [
        name for name in promised if name not in odd and _found(file, name) != promised[name]
    ]
    return identity_gate("bytes", "onnx, by this project's reader", len(expected), odd + differing)


def _found(file: OnnxFile, name: str) -> dict[str, str] | None:
    kind = file.types[name]
    try:
        if kind in FLOAT_TYPES:
            return promise(kind, torch.from_numpy(file.floats(name)))
        return promise(kind, file.quantized(name))
    except InputError:
        return None


def _tokens_gate(runner: OnnxRuntime, source: Source, texts: Texts) -> Gate:
    """The tokenizer.json beside the file against the checkpoint's tokenizer."""
    compared = tokenizer_texts(source, texts.sources[1].text)
    wrong = differing_texts(source, compared, runner.tokenize)
    return identity_gate("tokens", "tokenizers", len(compared), wrong)


def _census_gate(runtime: str, census: Census, source: Source) -> Gate:
    """What ONNX Runtime made of the linears: of quantized ones MatMulNBits, all of them but those
    in types that it never fuses, which it expands to floats in every call."""
    kinds = source.plan.types
    linears = [kinds[name] for name in kinds if name not in (EMBEDDING, HEAD)] + [
        kinds[source.head]
    ]
    quantized = sum(kind not in FLOAT_TYPES for kind in linears)
    expanded = sum(_is_expanded(kind) for kind in linears)
    fused = quantized - expanded
    wanted = Census(fused, len(linears) - quantized + _rotations(source), expanded)
    left = f"{census.dequantizers} DequantizeLinear, {census.float_linears} float products"
    other = "other " if expanded else ""
    claim = f"all {fused} products with {other}quantized weights became MatMulNBits"
    if expanded:
        claim += f"; {expanded} with FP8 are never fused, their weights are expanded in every call"
    written = sum(_is_written_fused(kind) for kind in linears)
    if written:
        claim += f"; {written} with float zero points are that in the file, slow and not standard"
    return Gate(
        level="census",
        claim=claim,
        runtime=runtime,
        figure=f"{census.fused} fused" + (f", {census.dequantizers} expanded" if expanded else ""),
        limit=f"{fused} fused, {expanded} DequantizeLinear",
        status="green" if census == wanted else "red",
        detail="" if census == wanted else f"left: {left}",
    )


def _is_expanded(kind: str) -> bool:
    """Whether a quantized type is never fused."""
    storage = _storage(kind)
    return storage is not None and storage.number == "e4m3"


def _is_written_fused(kind: str) -> bool:
    """Whether a quantized type is a MatMulNBits in the file already."""
    storage = _storage(kind)
    return storage is not None and storage.float_zeros


def _storage(kind: str) -> Storage | None:
    if kind in FLOAT_TYPES:
        return None
    fmt = get_format(kind)
    return storage_of(fmt, (OUTPUTS_AT_2_BITS, fmt.group_size))


def _rotations(source: Source) -> int:
    """Products of rotations at run time, which are floats: one or two a block."""
    if source.online is None:
        return 0
    factors = sum(len(matrix) > 1 for matrix in kronecker_pair(source.online))
    return factors * int(source.config.num_hidden_layers)


def _twin_gates(found: Comparison, recipe: Recipe) -> list[Gate]:
    checks = (
        ("abs(d ln ppl)", abs(found.delta_nll), recipe.gates.twin),
        ("largest logit difference", found.logit_difference, recipe.gates.logits),
    )
    return [limit_gate("twin", CLAIMS["twin"], EXACT, *check) for check in checks]


def prompts_of(tokens: Tensor) -> Tensor:
    """Beginnings of texts to continue, int64 [`PROMPTS`, length].

    Args:
        tokens: Evaluation windows, int64 [windows, context]; with fewer than `PROMPTS`, several
            beginnings are cut from each.
    """
    windows, context = tokens.shape
    length = max(1, min(PROMPT_TOKENS, context - NEW_TOKENS))
    each = -(-PROMPTS // windows)
    starts = torch.linspace(0, context - length, each).long()
    cut = [row[start : start + length] for start in starts.tolist() for row in tokens]
    return torch.stack(cut[:PROMPTS])


@torch.inference_mode()
def greedy_gate(runner: OnnxRuntime, twin: TorchReference, prompts: Tensor, recipe: Recipe) -> Gate:
    """Greedy continuations in ONNX Runtime against PyTorch.

    PyTorch reads each continuation once and must find every token of it the most probable one: then
    it would have generated the same. Where it finds another one ahead by less than the limit on
    logits, float32 noise decided a tie; these are counted.

    Args:
        runner: Exact mode.
        twin: PyTorch with the file's weights.
        prompts: int64 [prompts, length].
        recipe: Limit of a tie.
    """
    count = min(NEW_TOKENS, int(twin.config.max_position_embeddings) - prompts.shape[1])
    new = runner.greedy_batch(prompts, count)
    texts = torch.cat([prompts, new, new[:, -1:]], dim=1)
    ties = others = 0
    for logits, tokens in zip(twin.logits(texts, prompts.shape[1] - 1), new, strict=True):
        rows = logits[:count]
        behind = rows.amax(-1) - rows.gather(-1, tokens[:, None])[:, 0]
        others += int((behind >= recipe.gates.logits).sum())
        ties += int(((behind > 0) & (behind < recipe.gates.logits)).sum())
    claim = f"{count} greedy tokens after each of {len(prompts)} prompts are PyTorch's"
    tied = f"{ties} ties within {recipe.gates.logits:g} went the other way" if ties else ""
    return Gate(
        level="greedy",
        claim=claim,
        runtime=EXACT,
        figure=f"{others} differ" if others else "identical",
        limit="identical",
        status="red" if others else "green",
        detail=tied,
    )


def _deployed_gate(path: Path, found: Comparison, context: int, recipe: Recipe) -> Gate:
    """What a user gets: products with activations in 8 bits. A report, as no rule says how near
    they must come."""
    speed = measure(
        path,
        prompt=max(2, min(128, context - 34)),
        time_limit=float(recipe.runtime.time_limit_s),
    )
    detail = (
        f"mean KLD {found.kld_mean:.2g}; {speed.prompt_tokens_per_second:.0f} prompt and "
        f"{speed.new_tokens_per_second:.0f} new tokens/s, {size(speed.memory_bytes)} of memory"
    )
    return Gate(
        level="deployed",
        claim="activations in 8 bits against PyTorch, abs(d ln ppl)",
        runtime=DEFAULT,
        figure=abs(found.delta_nll),
        limit="report only",
        status="green",
        detail=detail,
    )
