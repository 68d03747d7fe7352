"""Declared shapes against transformers' own models, and everything that must be refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from pipeline.architectures import ARCHITECTURES, get_architecture, rope_parameters
from pipeline.errors import InputError, UnsupportedError

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GOOD: dict[str, Any] = {"model_type": "llama", **SIZES}

VARIANTS = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 12}),
    ("llama", {"attention_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("qwen2", {}),
    ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {}),
]


def config_of(family: str, **settings: Any) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json as transformers writes it, and the shapes of the model that it builds."""
    import transformers

    architecture = ARCHITECTURES[family]
    config = getattr(transformers, f"{architecture.class_prefix}Config")(**SIZES | settings)
    with torch.device("meta"):
        model = getattr(transformers, f"{architecture.class_prefix}ForCausalLM")(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    return config.to_dict(), shapes


@pytest.mark.parametrize(("family", "settings"), VARIANTS)
def test_tensors_are_the_parameters_of_the_transformers_model(
    family: str, settings: dict[str, Any]
) -> None:
    config, shapes = config_of(family, **settings)
    assert get_architecture(config).tensors(config) == shapes


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_missing_optional_sizes_mean_what_transformers_means(family: str) -> None:
    config, shapes = config_of(family, num_key_value_heads=4)
    for key in ("head_dim", "num_key_value_heads"):
        config.pop(key, None)
    assert get_architecture(config).tensors(config) == shapes


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_sites_cover_every_linear_of_a_block_once(architecture: Any) -> None:
    config, shapes = config_of(architecture.model_type)
    prefix = architecture.block_prefix(1)
    matrices = {
        name.removeprefix(prefix).removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith(prefix) and len(shape) == 2
    }
    assert sorted(architecture.linears) == sorted(matrices)
    block = architecture.block_tensors(config)
    for site in architecture.sites:
        widths = {block[f"{linear}.weight"][1] for linear in site.linears}
        assert len(widths) == 1, "linears of a site read the same input"
        assert f"{site.producer}.weight" in block
        assert all(architecture.site_of(linear) is site for linear in site.linears)


@pytest.mark.parametrize(("family", "settings"), [v for v in VARIANTS if "tie" not in str(v)])
def test_sites_read_the_same_tensor_in_the_real_model(
    family: str, settings: dict[str, Any]
) -> None:
    import transformers

    architecture = ARCHITECTURES[family]
    config = getattr(transformers, f"{architecture.class_prefix}Config")(**SIZES | settings)
    with torch.random.fork_rng():
        model = getattr(transformers, f"{architecture.class_prefix}ForCausalLM")(config)
    seen: dict[str, torch.Tensor] = {}
    order: list[str] = []
    block = model.model.layers[0]

    def record(name: str) -> Any:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = inputs[0]
            order.append(name)

        return hook

    for name in architecture.linears:
        block.get_submodule(name).register_forward_pre_hook(record(name))
    model(torch.arange(6)[None])
    for site in architecture.sites:
        first = seen[site.linears[0]]
        assert all(torch.equal(seen[name], first) for name in site.linears)
    assert [architecture.site_of(name).name for name in order] == [
        architecture.site_of(name).name for name in architecture.linears
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "lama"}, "did you mean llama"),
        ({"model_type": "gpt2"}, "qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"partial_rotary_factor": 0.5}, "part of each head"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "RoPE type"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        (
            {
                "model_type": "qwen2",
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            "llama3",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        get_architecture(GOOD | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 30}, "multiple of 4 heads"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"head_dim": 7}, "odd"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "contradicts"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "contradicts"),
    ],
)
def test_malformed_configs_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        get_architecture(GOOD | change)


@pytest.mark.parametrize(
    "harmless",
    [
        {"hidden_act": "swish"},
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},
        {"pretraining_tp": 1, "hidden_act": "silu", "architectures": ["LlamaForCausalLM"]},
        {"rope_scaling": None, "head_dim": None, "quantization_config": None},
        {"torch_dtype": "bfloat16", "dtype": "bfloat16"},
        {"partial_rotary_factor": 1.0},
    ],
)
def test_settings_that_change_nothing_pass(harmless: dict[str, Any]) -> None:
    assert get_architecture(GOOD | harmless).model_type == "llama"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": YARN},
        {
            "rope_theta": 5e5,
            "rope_scaling": {("type" if k == "rope_type" else k): v for k, v in YARN.items()},
        },
        {"rope_parameters": {"rope_theta": 5e5, **YARN}},
        {"rope_theta": 5e5, "rope_parameters": YARN, "rope_scaling": None},
    ],
)
def test_every_spelling_of_rope_means_the_same(spelling: dict[str, Any]) -> None:
    assert rope_parameters(spelling) == {"rope_theta": 5e5, **YARN}


def test_an_unknown_architecture_is_refused_without_torch() -> None:
    code = (
        "import sys, time\n"
        "from pipeline.architectures import get_architecture\n"
        "from pipeline.errors import UnsupportedError\n"
        "try:\n"
        "    get_architecture({'model_type': 'qwen9'})\n"
        "except UnsupportedError as error:\n"
        "    assert 'qwen3' in str(error)\n"
        "    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    assert time.process_time() < 2, time.process_time()\n"
        "    sys.exit(error.exit_code)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 11
