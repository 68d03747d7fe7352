"""The demo model as an F32 GGUF file, written without the project's own writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import pipeline.demo

MODEL = Path(pipeline.demo.__file__).parent / "model"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k from two halves a head (transformers) to interleaved pairs (llama.cpp)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path, *, tokenizer: bool = True, **overrides: Any) -> None:
    """Writes the demo model in F32; `overrides` replaces metadata by the key after ``llama.``."""
    import gguf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    config = model.config
    metadata: dict[str, int | float] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
        **overrides,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{key}", value)
    writer.add_file_type(0)
    if tokenizer:
        _add_tokenizer(writer)
    else:
        writer.add_tokenizer_model("none")
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        if "q_proj" in name:
            weight = permuted(weight, config.num_attention_heads)
        if "k_proj" in name:
            weight = permuted(weight, config.num_key_value_heads)
        writer.add_tensor(_tensor_name(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_name(name: str) -> str:
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        name = name.replace(ours, theirs)
    return name


def _add_tokenizer(writer: Any) -> None:
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["id"] for token in tokenizer["added_tokens"]}
    control, normal = 3, 1
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([control if i in special else normal for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in _pairs(tokenizer["model"]["merges"])])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)


def _pairs(merges: list[Any]) -> list[list[str]]:
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
