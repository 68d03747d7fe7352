"""genai_config.json: what onnxruntime-genai needs to know to generate with the model."""

from __future__ import annotations

from typing import Any

from exporters.config_fields import Config, integer
from exporters.onnx.names import MODEL
from exporters.onnx.size import DecoderSize

EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Session options under which products are exact to float32; ONNX Runtime's own default rounds
activations to 8 bits, which is known to change greedy tokens."""


def genai_config(config: Config, *, exact: bool) -> dict[str, Any]:
    """Content of genai_config.json, for all kinds of attention.

    The past and present cache are separate: only GroupQueryAttention could share one buffer, and
    that needs the cache at its final length from the start.

    Args:
        config: Content of the Hugging Face config.json.
        exact: Ask for `EXACT` products. ONNX Runtime has a fast kernel for them at 4 bits only.
    """
    size = DecoderSize.of(config)
    context = integer(config, "max_position_embeddings", 2048)
    end = config.get("eos_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    pad = config.get("pad_token_id")
    tokens = {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": end,
        "pad_token_id": first_end if pad is None else pad,
    }
    decoder = {
        "session_options": dict(EXACT) if exact else {},
        "filename": MODEL,
        "head_size": size.head_dim,
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "num_hidden_layers": size.layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            "type": config["model_type"],
            "vocab_size": size.vocabulary,
            "context_length": context,
            **{name: value for name, value in tokens.items() if value is not None},
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "past_present_share_buffer": False,
        },
    }
