"""ONNX Runtime as a runtime, against transformers with the same dequantized weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from pipeline.errors import InputError, UnsupportedError, UsageError, VerificationError
from runtimes.base import Runtime
from runtimes.metrics import Perplexity, token_nll
from runtimes.onnxruntime import Census, OnnxRuntime
from runtimes.onnxruntime_speed import measure
from tests.onnx_models import EMBEDDING, HEAD, TinyModel, random_ids
from tests.tiny import tiny_tokenizer

GATE = 1e-5
"""Nats: the ladder's gate between the runtime's exact mode and PyTorch."""


def tiny(kind: str, family: str = "llama") -> TinyModel:
    floats = {EMBEDDING: "F16", HEAD: "F16"}
    return TinyModel(family, lambda name: floats.get(name, kind))


def log_perplexity(runtime: OnnxRuntime, tokens: torch.Tensor) -> float:
    found = runtime.logits(tokens, 0)
    nll = [token_nll(x, row[1:]) for x, row in zip(found, tokens, strict=True)]
    return Perplexity.from_nll(torch.cat(nll)).mean_nll


@pytest.mark.parametrize("kind", ["Q4_0", "INT4_G64", "INT3_G32", "Q2_0", "INT2_G32", "INT8_G32"])
def test_perplexity_is_that_of_the_dequantized_weights(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    tokens = torch.from_numpy(random_ids(3, 64))
    wanted = torch.from_numpy(model.logits(tokens.numpy()))[:, :-1].flatten(0, 1)
    reference = Perplexity.from_nll(token_nll(wanted, tokens[:, 1:].flatten())).mean_nll
    path = model.write(tmp_path)
    with OnnxRuntime(path, threads=1) as exact:
        assert abs(log_perplexity(exact, tokens) - reference) < GATE
        assert exact.speed is not None
        assert exact.speed > 0
    with OnnxRuntime(path, mode="default", threads=1) as default:
        assert GATE < abs(log_perplexity(default, tokens) - reference) < 0.1


def test_logits_of_the_positions_asked_for(tmp_path: Path) -> None:
    model = tiny("Q4_0")
    tokens = torch.from_numpy(random_ids(2, 20))
    with OnnxRuntime(model.write(tmp_path)) as runtime:
        assert isinstance(runtime, Runtime)
        assert runtime.name == "ONNX Runtime (exact)"
        found = list(runtime.logits(tokens, 12))
        assert list(runtime.logits(tokens[:0], 12)) == []
    assert [x.shape for x in found] == [(7, 512)] * 2
    wanted = torch.from_numpy(model.logits(tokens.numpy()))[:, 12:-1]
    torch.testing.assert_close(torch.stack(found), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["Q4_0", "INT3_G32", "Q2_0"])
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = tiny(kind, "qwen3")
    runtime = OnnxRuntime(model.write(tmp_path), threads=1)
    for prompt in random_ids(4, 9, seed=3):
        text = list(map(int, prompt))
        wanted = list(text)
        while len(wanted) < len(text) + 16:
            wanted.append(int(model.logits(np.array([wanted]))[0, -1].argmax()))
        assert runtime.greedy(text, 16) == wanted[len(text) :]
    assert runtime.greedy([1], 0) == []


@pytest.mark.parametrize("attention", ["standard", "primitive", "gqa"])
def test_texts_continued_together_are_those_continued_alone(attention: str, tmp_path: Path) -> None:
    path = tiny("Q4_0").write(tmp_path, attention=attention)
    runtime, prompts = OnnxRuntime(path, threads=1), torch.from_numpy(random_ids(3, 9, seed=5))
    found = runtime.greedy_batch(prompts, 12)
    assert found.tolist() == [runtime.greedy(prompt, 12) for prompt in prompts.tolist()]
    assert runtime.greedy_batch(prompts, 0).shape == (3, 0)


def test_speed_and_memory_of_a_child_process(tmp_path: Path) -> None:
    path = tiny("Q4_0").write(tmp_path)
    found = measure(path, prompt=16, new=4, threads=1)
    assert min(found.prompt_tokens_per_second, found.new_tokens_per_second) > 0
    assert 0 < found.load_seconds < 60
    assert 0 <= found.memory_bytes < 1 << 30
    with pytest.raises(VerificationError, match=r"more than 0\.01 s on model\.onnx"):
        measure(path, time_limit=0.01)
    (tmp_path / "model.onnx_data").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"failed on model\.onnx"):
        measure(path)


@pytest.mark.parametrize("mode", ["exact", "default"])
@pytest.mark.parametrize("kind", ["Q4_0", "INT3_G32", "Q2_0", "INT8_G64"])
def test_census(kind: str, mode: str, tmp_path: Path) -> None:
    runtime = OnnxRuntime(tiny(kind).write(tmp_path), mode=mode)  # type: ignore[arg-type]
    assert runtime.census() == Census(fused=14, float_linears=1, dequantizers=0)


def test_a_census_finds_what_is_not_fused(tmp_path: Path) -> None:
    """A group that the exporter refuses: written by hand into its file."""
    path = tiny("INT4_G64").write(tmp_path)
    proto = onnx.load(str(path))
    node = next(node for node in proto.graph.node if node.op_type == "DequantizeLinear")
    name = proto.graph.node[[n.output[0] for n in proto.graph.node].index(node.input[1])].input[0]
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    doubled = np.repeat(onnx.numpy_helper.to_array(scale), 8, axis=0)
    scale.CopyFrom(onnx.numpy_helper.from_array(doubled, name))
    next(a for a in node.attribute if a.name == "block_size").i = 8
    onnx.save(proto, str(path))
    assert OnnxRuntime(path).census() == Census(fused=13, float_linears=1, dequantizers=1)


def test_tokenizer_beside_the_file(tmp_path: Path) -> None:
    runtime = OnnxRuntime(tiny("Q4_0").write(tmp_path))
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        runtime.tokenize("a")
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="cannot tokenize"):
        runtime.tokenize("a")
    tokenizer = tiny_tokenizer("qwen2")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert runtime.tokenize("def f(x):") == tokenizer.encode("def f(x):").ids


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    path = tiny("Q4_0").write(tmp_path)
    with pytest.raises(InputError, match="not a file"):
        OnnxRuntime(tmp_path / "missing.onnx")
    with pytest.raises(UsageError, match="mode 'fast'"):
        OnnxRuntime(path, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads 0"):
        OnnxRuntime(path, threads=0)
    runtime = OnnxRuntime(path)
    with pytest.raises(InputError, match="nothing to score"):
        runtime.logits(torch.zeros(1, 4, dtype=torch.int64), 3)
    with pytest.raises(InputError, match="token 512 in a vocabulary of 512"):
        list(runtime.logits(torch.full((1, 4), 512), 0))
    with pytest.raises(InputError, match="token -1"):
        runtime.greedy([-1], 1)
    with pytest.raises(InputError, match="empty"):
        runtime.greedy([], 1)


def test_files_that_the_runtime_cannot_use(tmp_path: Path) -> None:
    path = tiny("Q4_0").write(tmp_path)
    (tmp_path / "model.onnx_data").write_bytes(b"")
    with pytest.raises(VerificationError, match=r"refused model\.onnx"):
        list(OnnxRuntime(path).logits(torch.zeros(1, 4, dtype=torch.int64), 0))
    path.write_bytes(b"junk")
    with pytest.raises(VerificationError, match=r"refused model\.onnx"):
        OnnxRuntime(path).census()
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=10), str(path))
    with pytest.raises(InputError, match="is not a decoder"):
        OnnxRuntime(path).greedy([1], 1)


def test_a_failure_while_running(tmp_path: Path) -> None:
    """A cache of which one block is missing an axis: refused by the runtime, reported by us."""
    path = tiny("Q4_0").write(tmp_path)
    proto = onnx.load(str(path))
    past = next(v for v in proto.graph.input if v.name == "past_key_values.0.key")
    past.type.tensor_type.shape.dim[3].dim_value = 8
    onnx.save(proto, str(path))
    with pytest.raises(VerificationError, match="ONNX Runtime"):
        OnnxRuntime(path).greedy([1, 2], 1)
