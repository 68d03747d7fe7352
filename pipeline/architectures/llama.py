"""Llama 1, 2, 3.x and everything that says it is one."""

from __future__ import annotations

from pipeline.architectures.base import Architecture

LLAMA = Architecture(
    model_type="llama",
    class_prefix="Llama",
    rope_types=frozenset({"default", "linear", "llama3", "yarn"}),
    biases={
        "self_attn.q_proj": "attention_bias",
        "self_attn.k_proj": "attention_bias",
        "self_attn.v_proj": "attention_bias",
        "self_attn.o_proj": "attention_bias",
        "mlp.gate_proj": "mlp_bias",
        "mlp.up_proj": "mlp_bias",
        "mlp.down_proj": "mlp_bias",
    },
)
