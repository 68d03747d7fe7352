"""Hyperparameters of a Hugging Face config as GGUF metadata (llama-arch.cpp, llama-model.cpp).

A config whose meaning the stock runtime would change silently is refused.
"""

from __future__ import annotations

from typing import NoReturn

from exporters.gguf.fields import Config, KeyValue, head_dim, integer, number
from exporters.gguf.rope import rope_factors, rope_metadata
from pipeline.errors import UnsupportedError

__all__ = ["KeyValue", "hyperparameters", "rope_factors"]

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def hyperparameters(config: Config) -> list[KeyValue]:
    """The ``{arch}.*`` entries of a llama, qwen2 or qwen3 model.

    Args:
        config: Content of config.json, written by transformers 4 or 5.

    Raises:
        InputError: A size is missing or makes no sense.
        UnsupportedError: Stock llama.cpp would compute something else.
    """
    _check_supported(config)
    heads = integer(config, "num_attention_heads")
    entries: list[tuple[str, str, float]] = [
        ("vocab_size", "uint32", integer(config, "vocab_size")),
        ("context_length", "uint32", integer(config, "max_position_embeddings")),
        ("block_count", "uint32", integer(config, "num_hidden_layers")),
        ("embedding_length", "uint32", integer(config, "hidden_size")),
        ("feed_forward_length", "uint32", integer(config, "intermediate_size")),
        ("attention.head_count", "uint32", heads),
        ("attention.head_count_kv", "uint32", integer(config, "num_key_value_heads", heads)),
        ("attention.key_length", "uint32", head_dim(config)),
        ("attention.value_length", "uint32", head_dim(config)),
        ("attention.layer_norm_rms_epsilon", "float32", number(config, "rms_norm_eps", 1e-6)),
    ]
    prefix = config["model_type"]
    sizes = [KeyValue(f"{prefix}.{key}", kind, value) for key, kind, value in entries]
    return sizes + rope_metadata(config)


def _check_supported(config: Config) -> None:
    kind = str(config.get("model_type"))
    if kind not in _CLASSES:
        _refuse(f"model_type {kind!r}", f"this exporter knows {', '.join(_CLASSES)}")
    wanted = _CLASSES[kind]
    classes = config.get("architectures") or [wanted]
    if wanted not in classes:
        _refuse(f"architectures {classes!r}", f"only {wanted} has the graph of llama.cpp's {kind}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        _refuse(f"hidden_act {config['hidden_act']!r}", "llama.cpp's graph always uses silu")
    _check_attention(config, kind)


def _check_attention(config: Config, kind: str) -> None:
    dimensions, hidden = head_dim(config), integer(config, "hidden_size")
    windows = set(config.get("layer_types") or ()) - {"full_attention"}
    if config.get("use_sliding_window") or windows:
        _refuse("sliding window attention", f"llama.cpp's {kind} graph attends to everything")
    if dimensions % 2:
        _refuse(f"head_dim {dimensions}", "rotary embeddings need an even size")
    if kind == "qwen2" and dimensions * integer(config, "num_attention_heads") != hidden:
        _refuse(
            f"qwen2 with heads of {dimensions} in a hidden size of {hidden}",
            "llama.cpp expects hidden_size / num_attention_heads there",
        )
    if kind == "qwen3" and config.get("attention_bias"):
        _refuse("qwen3 with attention_bias", "llama.cpp's qwen3 graph has no output bias")


def _refuse(what: str, why: str) -> NoReturn:
    raise UnsupportedError(f"not supported in GGUF: {what}", why=why)
