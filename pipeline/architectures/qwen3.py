"""Qwen 3 (dense): normed queries and keys, no biases, heads wider than ``hidden / heads``."""

from __future__ import annotations

from pipeline.architectures.base import Architecture

QWEN3 = Architecture(
    model_type="qwen3",
    class_prefix="Qwen3",
    rope_types=frozenset({"default", "linear", "yarn"}),
    refused_flags=frozenset({"attention_bias"}),
    qk_norm=True,
    default_head_dim=128,
)
