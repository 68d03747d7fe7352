"""Qwen 2 and 2.5: biases on queries, keys and values, whatever the config says."""

from __future__ import annotations

from pipeline.architectures.base import Architecture

QWEN2 = Architecture(
    model_type="qwen2",
    class_prefix="Qwen2",
    rope_types=frozenset({"default", "linear", "yarn"}),
    biases={
        "self_attn.q_proj": True,
        "self_attn.k_proj": True,
        "self_attn.v_proj": True,
    },
)
