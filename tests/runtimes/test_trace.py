"""Tensors from inside llama.cpp and the emulator, against hooks on transformers' modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tiny_gguf import random_model, write
from torch import Tensor, nn

from pipeline.errors import (
    InputError,
    PipelineError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from runtimes import llamacpp, llamacpp_trace
from runtimes.ggml_emulator import GGMLEmulator
from runtimes.llamacpp import LlamaCpp
from runtimes.llamacpp_decode import Evaluator
from runtimes.trace import BLOCK_TENSORS, HEAD_TENSORS, TRACED_TOKENS

needs_llamacpp = pytest.mark.skipif(not llamacpp.available(), reason="needs llama.cpp")
RUNTIMES = [
    pytest.param(LlamaCpp, id="llama.cpp", marks=needs_llamacpp),
    pytest.param(GGMLEmulator, id="emulator"),
]
LAYERS = 3


def hooked(model: Any, tokens: Tensor) -> list[dict[str, Tensor]]:
    """The trace of a transformers model, by hooks on its modules."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[module] = (inputs[0], output)

    watched = [m for m in model.modules() if isinstance(m, nn.Linear) or "Norm" in str(type(m))]
    handles = [m.register_forward_hook(keep) for m in watched]
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]
    for handle in handles:
        handle.remove()
    norm = model.model.norm
    after = [seen[layer.input_layernorm][0] for layer in model.model.layers[1:]]
    after.append(seen[norm][0])
    trace = []
    for layer, residual in zip(model.model.layers, after, strict=True):
        tensors = (
            seen[layer.input_layernorm][1],
            seen[layer.self_attn.o_proj][0],
            seen[layer.post_attention_layernorm][0],
            seen[layer.post_attention_layernorm][1],
            seen[layer.mlp.down_proj][0],
            residual,
        )
        trace.append({name: t[0] for name, t in zip(BLOCK_TENSORS, tensors, strict=True)})
    head = (seen[norm][1][0], logits)
    return [*trace, dict(zip(HEAD_TENSORS, head, strict=True))]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_tensors_are_those_of_transformers(
    architecture: str, options: dict[str, Any], runtime: Callable[[Path], Any], tmp_path: Path
) -> None:
    model = random_model(architecture, num_hidden_layers=LAYERS, **options)
    path = write(tmp_path / "tiny.gguf", model)
    tokens = torch.randint(96, (200,), generator=torch.Generator().manual_seed(1))
    with runtime(path) as opened:
        found = list(opened.trace(tokens))
    expected = hooked(model, tokens)
    assert [set(tensors) for tensors in found] == [set(tensors) for tensors in expected]
    assert len(found) == LAYERS + 1
    for ours, theirs in zip(found, expected, strict=True):
        for name, values in theirs.items():
            assert ours[name].shape == values.shape
            assert (ours[name] - values).norm() < 1e-4 * values.norm(), name


@needs_llamacpp
@pytest.mark.parametrize("length", [300, TRACED_TOKENS])
def test_logits_are_those_of_an_evaluation_without_a_trace(
    length: int, demo_gguf: Path, demo_ids: list[int]
) -> None:
    tokens = torch.tensor(demo_ids[:length])
    runtime = LlamaCpp(demo_gguf)
    *_, head = runtime.trace(tokens)
    (logits,) = runtime.logits(tokens[None], 0)
    assert torch.equal(head["logits"][:-1], logits)


@needs_llamacpp
@pytest.mark.parametrize("length", [1, 2, 33])
def test_looking_changes_no_bit(length: int, demo_gguf: Path, demo_ids: list[int]) -> None:
    """Even of short windows, where llama.cpp takes another kernel for the last row alone."""
    evaluator = Evaluator(str(demo_gguf), np.array([demo_ids[:length]]), range(length))
    evaluator.start(exact=True, threads=1)
    (alone,) = evaluator.run()
    *_, head = LlamaCpp(demo_gguf).trace(torch.tensor(demo_ids[:length]))
    assert np.array_equal(head["logits"].numpy(), alone)


@pytest.mark.parametrize("round_activations", [True, False])
def test_looking_does_not_change_the_emulator(round_activations: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", random_model("llama"))
    tokens = torch.randint(96, (50,), generator=torch.Generator().manual_seed(1))
    with GGMLEmulator(path, round_activations=round_activations) as emulator:
        *_, head = emulator.trace(tokens)
        (logits,) = emulator.logits(tokens[None], 0)
    torch.testing.assert_close(head["logits"][:-1], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_windows_that_cannot_be_traced(runtime: Callable[[Path], Any], tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", random_model("qwen2"))
    windows = {
        "int64": torch.zeros(4),
        "a traced window": torch.zeros(1, 4, dtype=torch.int64),
        "a window of 0 tokens": torch.zeros(0, dtype=torch.int64),
        "a window of 513 tokens": torch.zeros(513, dtype=torch.int64),
        "negative token id -1": torch.tensor([3, -1]),
        "outside the vocabulary": torch.tensor([3, 96]),
    }
    with runtime(path) as opened:
        for words, tokens in windows.items():
            with pytest.raises(InputError, match=words):
                list(opened.trace(tokens))


@needs_llamacpp
def test_faults_in_the_middle_are_told_and_leave_no_child(demo_gguf: Path) -> None:
    process = psutil.Process()
    before = set(process.children())
    tokens = torch.arange(TRACED_TOKENS)
    stream = LlamaCpp(demo_gguf).trace(tokens)
    next(stream)
    (child,) = set(process.children()) - before
    child.kill()
    with pytest.raises(PipelineError, match=r"demo\.gguf \(trace\) ran out of memory"):
        list(stream)
    with LlamaCpp(demo_gguf) as runtime:
        stream = runtime.trace(tokens)
        next(stream)
    with pytest.raises(UsageError, match="was closed while it was in use"):
        next(stream)
    stream = LlamaCpp(demo_gguf).trace(tokens)
    next(stream)
    del stream
    assert set(process.children()) == before


@needs_llamacpp
def test_a_damaged_file_is_refused(truncated_gguf: Path) -> None:
    with pytest.raises(VerificationError, match=r"refuses to load truncated\.gguf"):
        next(LlamaCpp(truncated_gguf).trace(torch.arange(4)))


def tapped(path: Path, extra_blocks: int, take: Callable[[np.ndarray], None]) -> None:
    """An evaluation with a tap, in this process; raises what its end raises."""
    evaluator = Evaluator(str(path), np.arange(8)[None], range(8))
    tap = llamacpp_trace.GraphTap(evaluator.blocks + extra_blocks, take)
    evaluator.start(exact=True, threads=1, callback=tap.callback)
    for _ in evaluator.run():
        tap.finish()


@needs_llamacpp
def test_a_graph_with_other_names_is_refused(
    demo_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedError, match="no tensor attn_norm-4 in its place"):
        tapped(demo_gguf, 1, lambda values: None)
    names = dict(llamacpp_trace.HEAD_NAMES, logits="result_renamed")
    monkeypatch.setattr(llamacpp_trace, "HEAD_NAMES", names)
    with pytest.raises(UnsupportedError, match="no tensor result_renamed in its place"):
        tapped(demo_gguf, 0, lambda values: None)


@needs_llamacpp
def test_an_error_while_taking_ends_the_evaluation_and_is_raised(demo_gguf: Path) -> None:
    taken = []

    def take(values: np.ndarray) -> None:
        taken.append(len(values))
        raise MemoryError("full")

    with pytest.raises(MemoryError, match="full"):
        tapped(demo_gguf, 0, take)
    assert taken == [8 * 256]
