"""Tiny random Hugging Face models as F32 GGUF files, with names from the `gguf` package."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from demo_file import permuted
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def random_model(architecture: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """One layer with weights large enough that every part of it shows in the logits."""
    make_config, make_model = CLASSES[architecture]
    config = make_config(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            **options,
        }
    )
    model = make_model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model


def write(
    path: Path,
    model: PreTrainedModel,
    metadata: dict[str, int | float | str] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
    drop: tuple[str, ...] = (),
    packed: dict[str, tuple[np.ndarray, str]] | None = None,
) -> Path:
    """Writes a model in F32 without tokenizer.

    Args:
        path: File to write.
        model: The model.
        metadata: Added or replaced values by the key after the architecture.
        tensors: Added or replaced tensors by GGUF name.
        drop: Metadata keys (without architecture) and GGUF tensors to leave out.
        packed: Rows as ggml stores them, uint8 [out, row bytes], and their type, by GGUF name.
    """
    config, architecture = model.config, model.config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values: dict[str, int | float | str] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(_theta(config)),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("none")
    for key, value in values.items():
        if key not in drop:
            kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kind[type(value)](f"{architecture}.{key}", value)
    for name, array in (_arrays(model) | (tensors or {})).items():
        if name not in drop and name not in (packed or {}):
            writer.add_tensor(name, np.ascontiguousarray(array))
    for name, (rows, kind) in (packed or {}).items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _theta(config: Any) -> float:
    """transformers 4 keeps it beside the RoPE parameters, transformers 5 among them."""
    if hasattr(config, "rope_theta"):
        return config.rope_theta
    return config.rope_parameters["rope_theta"]


def _arrays(model: PreTrainedModel) -> dict[str, np.ndarray]:
    config = model.config
    kind = gguf.MODEL_ARCH[config.model_type.upper()]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    arrays = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name and config.model_type == "llama":
                weight = permuted(weight.reshape(len(weight), -1), count).reshape(weight.shape)
        arrays[names.get_name(name, try_suffixes=(".weight", ".bias"))] = weight.numpy()
    return arrays
