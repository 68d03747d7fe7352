"""Random models of the supported families, small enough to compare with llama.cpp in a second."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.gguf import (
    TensorEntry,
    Vocabulary,
    gguf_name,
    permute_rope,
    rope_factors,
    rope_heads,
    write_gguf,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def random_model(model_type: str, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A float32 model on its own random weights; biases and norms are not trivial."""
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in CLASSES[model_type])
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config_class(**copy.deepcopy({**SIZES, **overrides})))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    return model.float().eval()


def saved_config(model: torch.nn.Module, folder: Path) -> dict[str, Any]:
    """What save_pretrained puts into config.json."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def entries(model: torch.nn.Module, config: Mapping[str, Any]) -> list[TensorEntry]:
    """All parameters as F32 tensors."""
    found = []
    for hf_name, weight in model.named_parameters():
        if hf_name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        name, data = gguf_name(hf_name), weight.detach().numpy()
        heads = rope_heads(config, name)
        data = permute_rope(data, heads) if heads else data
        found.append(TensorEntry(name, "F32", data.shape, lambda data=data: data))
    factors = rope_factors(config)
    if factors is not None:
        found.append(TensorEntry("rope_freqs.weight", "F32", factors.shape, lambda: factors))
    return found


def export(model: torch.nn.Module, folder: Path, vocabulary: Vocabulary | None = None) -> Path:
    """Writes the model as an F32 GGUF file."""
    config = saved_config(model, folder)
    path = folder / "model.gguf"
    write_gguf(
        path,
        config=config,
        vocabulary=vocabulary,
        tensors=entries(model, config),
        file_type="F32",
    )
    return path


def torch_logits(model: torch.nn.Module, prompt: list[int]) -> np.ndarray:
    """Logits of all positions, float32 [tokens, vocabulary]."""
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].numpy()
