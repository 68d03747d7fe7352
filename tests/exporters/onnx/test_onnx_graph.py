"""The decoder's graph in ONNX Runtime against transformers, all weights float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.onnx_models import TinyModel, random_ids, run, session
from tests.tiny import FAMILIES

TOLERANCE = 2e-5
"""Logits reach 3; sums of 128 float32 products in another order differ by about 2e-6."""

ATTENTIONS = ("standard", "primitive", "gqa")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama no groups": ("llama", {"num_key_value_heads": 4}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama3 rope": ("llama", {"rope_scaling": LLAMA3}),
    "linear rope": ("qwen3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "yarn rope": ("qwen2", {"rope_scaling": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 wide heads": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    family, config = CASES[case]
    model = TinyModel(family, **config)
    ids = random_ids(2, 90)
    path = model.write(tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    logits, _ = run(session(path), ids)
    assert np.abs(logits - model.logits(ids)).max() < TOLERANCE


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_through_the_cache(family: str, attention: str, tmp_path: Path) -> None:
    model = TinyModel(family)
    ids = random_ids(1, 12)
    runtime = session(model.write(tmp_path, attention=attention))
    found, past = run(runtime, ids[:, :5])
    parts = [found]
    for end in range(6, 13):
        found, past = run(runtime, ids[:, end - 1 : end], np.ones((1, end), np.int64), past)
        parts.append(found)
    assert past["past_key_values.0.key"].shape == (1, 2, 12, 16)
    assert np.abs(np.concatenate(parts, axis=1) - model.logits(ids)).max() < TOLERANCE


@pytest.mark.parametrize("attention", ["standard", "primitive"])
def test_left_padding_in_a_batch_and_several_tokens_on_a_cache(
    attention: str, tmp_path: Path
) -> None:
    model = TinyModel("qwen3")
    ids, mask = random_ids(3, 16), np.ones((3, 16), np.int64)
    mask[1, :7] = mask[2, :3] = 0
    runtime = session(model.write(tmp_path, attention=attention))
    first, past = run(runtime, ids[:, :10], mask[:, :10])
    second, _ = run(runtime, ids[:, 10:], mask, past)
    logits = np.concatenate([first, second], axis=1)
    assert np.isfinite(logits).all()
    for row, start in enumerate((0, 7, 3)):
        alone = model.logits(ids[row : row + 1, start:])
        assert np.abs(logits[row, start:] - alone[0]).max() < TOLERANCE


@pytest.mark.parametrize(
    ("attention", "opset", "ir_version"), [("standard", 23, 11), ("primitive", 21, 10)]
)
def test_standard_operators_of_an_opset_that_runtimes_know(
    attention: str, opset: int, ir_version: int, tmp_path: Path
) -> None:
    path = TinyModel("qwen2").write(tmp_path, attention=attention)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version == ir_version
    assert {node.domain for node in model.graph.node} == {""}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_the_standard_graph_is_small(tmp_path: Path) -> None:
    path = TinyModel("llama").write(tmp_path)
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    per_block = [node for node in nodes if node.name.startswith("model.layers.1.")]
    assert len(per_block) <= 18
    assert len(nodes) <= 60


def test_group_query_attention_is_the_only_operator_of_the_runtime(tmp_path: Path) -> None:
    path = TinyModel("llama").write(tmp_path, attention="gqa")
    model = onnx.load(str(path))
    foreign = [node.op_type for node in model.graph.node if node.domain]
    assert foreign == ["GroupQueryAttention"] * 2


def test_names_are_those_that_optimum_and_genai_look_for(tmp_path: Path) -> None:
    runtime = session(TinyModel("llama").write(tmp_path))
    inputs = {value.name: (value.type, value.shape) for value in runtime.get_inputs()}
    outputs = {value.name: value.shape for value in runtime.get_outputs()}
    for index in range(2):
        for word in ("key", "value"):
            assert inputs.pop(f"past_key_values.{index}.{word}") == (
                "tensor(float)",
                ["batch_size", 2, "past_sequence_length", 16],
            )
            assert outputs.pop(f"present.{index}.{word}") == [
                "batch_size",
                2,
                "total_sequence_length",
                16,
            ]
    assert inputs == {
        "input_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "attention_mask": ("tensor(int64)", ["batch_size", "total_sequence_length"]),
        "position_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
    }
    assert outputs == {"logits": ["batch_size", "sequence_length", 512]}
