"""Hyperparameters: RoPE against transformers, and every config that has to be refused.

That the values mean the same in llama.cpp is shown by test_gguf_parity.py.
"""

import copy
from typing import Any

import numpy as np
import pytest

from exporters.gguf import hyperparameters, rope_factors
from pipeline.errors import InputError, UnsupportedError

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
QWEN2 = {**CONFIG, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**CONFIG, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def values(config: dict[str, Any]) -> dict[str, Any]:
    return {entry.key: entry.value for entry in hyperparameters(config)}


def test_plain_llama() -> None:
    assert values(CONFIG) == {
        "llama.vocab_size": 100,
        "llama.context_length": 512,
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
    }


def test_two_names_of_one_activation() -> None:
    assert values({**CONFIG, "hidden_act": "swish"}) == values(CONFIG)


def test_defaults_of_transformers() -> None:
    llama = {key: value for key, value in CONFIG.items() if key != "num_key_value_heads"}
    assert values(llama)["llama.attention.head_count_kv"] == 4
    assert values(QWEN3)["qwen3.attention.key_length"] == 128


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ],
)
def test_spellings_of_rope_parameters(rope: dict[str, Any]) -> None:
    found = values({**QWEN2, **rope})
    assert found["qwen2.rope.freq_base"] == 5e5
    assert found["qwen2.rope.scaling.type"] == "linear"
    assert found["qwen2.rope.scaling.factor"] == 2.0


def test_yarn() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1}
    found = values({**QWEN2, "rope_scaling": yarn})
    assert found["qwen2.rope.scaling.original_context_length"] == 512
    assert "qwen2.rope.scaling.attn_factor" not in found
    yarn = {**yarn, "original_max_position_embeddings": 128, "attention_factor": 1.0}
    found = values({**QWEN2, "rope_scaling": yarn})
    assert found["qwen2.rope.scaling.original_context_length"] == 128
    assert found["qwen2.rope.scaling.attn_factor"] == pytest.approx(1 / (0.1 * np.log(4) + 1))


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_llama3_factors_are_those_of_transformers(theta: float, size: int) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = {**CONFIG, "head_dim": size, "rope_theta": theta, "rope_scaling": LLAMA3}
    theirs = LlamaConfig(**copy.deepcopy(config))  # which changes its arguments
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    base = 1 / theta ** (np.arange(0, size, 2) / size)
    found = rope_factors(config)
    assert found is not None
    assert found.dtype == np.float32
    assert np.allclose(found, base / scaled.double().numpy(), rtol=1e-6)
    assert len(set(found.tolist())) >= 2


def test_no_factors_without_llama3() -> None:
    assert rope_factors(CONFIG) is None
    assert rope_factors({**CONFIG, "rope_scaling": {"type": "linear", "factor": 2.0}}) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "model_type": "mistral"}, "mistral"),
        ({**CONFIG, "model_type": None}, "model_type"),
        ({**CONFIG, "architectures": ["LlamaForSequenceClassification"]}, "SequenceClass"),
        ({**CONFIG, "hidden_act": "gelu"}, "gelu"),
        ({**CONFIG, "head_dim": 15}, "head_dim"),
        ({**CONFIG, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**CONFIG, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({**CONFIG, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({**CONFIG, "rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "x"),
        ({**CONFIG, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({**CONFIG, "rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 16}}, "beta_fast"),
        ({**CONFIG, "rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": 2}}, "beta_slow"),
        ({**CONFIG, "rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}}, "truncate"),
        ({**CONFIG, "rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1.0}}, "mscale"),
        ({**QWEN2, "rope_scaling": LLAMA3}, "llama3"),
        ({**CONFIG, "layer_types": ["sliding_attention"] * 2}, "sliding"),
        ({**QWEN2, "use_sliding_window": True}, "sliding"),
        ({**QWEN3, "layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({**QWEN2, "head_dim": 32}, "qwen2"),
        ({**QWEN3, "attention_bias": True}, "attention_bias"),
    ],
)
def test_what_llama_cpp_would_compute_differently(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        hyperparameters(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 0),
        ("hidden_size", True),
        ("hidden_size", 2**32),
        ("hidden_size", 64.0),
        ("hidden_size", 66),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", -1),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-5"),
        ("rope_theta", float("inf")),
        ("rope_theta", -1),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "yarn", "factor": 0}),
    ],
)
def test_values_that_make_no_sense(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=key.split("_")[0] if "rope" not in key else "rope|factor"):
        hyperparameters({**CONFIG, key: value})


def test_llama3_frequency_bounds() -> None:
    with pytest.raises(InputError, match="low_freq_factor"):
        rope_factors({**CONFIG, "rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}})
