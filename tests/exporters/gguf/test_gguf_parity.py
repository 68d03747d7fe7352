"""Stock llama.cpp computes from the exported file what transformers computes from the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llamacpp_probe import logits
from tiny_models import export, random_model, torch_logits

pytest.importorskip("llama_cpp")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-wide-heads": ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-multi-head": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-theta": ("llama", {"rope_theta": 500.0}),
    "llama-llama3-rope": ("llama", {"rope_scaling": LLAMA3}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-attention-factor": ("llama", {"rope_scaling": {**YARN, "attention_factor": 1.7}}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-linear-rope": (
        "qwen3",
        {"head_dim": 8, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    model_type, overrides = MODELS[name]
    model = random_model(model_type, **overrides)
    prompt = np.random.default_rng(0).integers(0, 96, 48).tolist()
    expected = torch_logits(model, prompt)
    found = logits(export(model, tmp_path), prompt)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < 1e-5  # measured: 1e-6
