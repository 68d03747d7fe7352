"""The model families that can be quantized: one small declaration each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.architectures.base import Architecture, Site
from pipeline.architectures.dimensions import Dimensions
from pipeline.architectures.llama import LLAMA
from pipeline.architectures.qwen2 import QWEN2
from pipeline.architectures.qwen3 import QWEN3
from pipeline.architectures.rope import rope_parameters
from pipeline.errors import InputError, UnsupportedError
from pipeline.suggest import did_you_mean

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Dimensions",
    "Site",
    "get_architecture",
    "rope_parameters",
]

ARCHITECTURES: dict[str, Architecture] = {a.model_type: a for a in (LLAMA, QWEN2, QWEN3)}


def get_architecture(config: Mapping[str, Any]) -> Architecture:
    """The family of a model, after checking that this very model can be handled.

    Args:
        config: The content of ``config.json``, as transformers 4 or 5 writes it.

    Raises:
        InputError: The config is malformed or contradicts itself.
        UnsupportedError: Unknown family, or a variant of a known one (RoPE type, activation,
            sliding window, quantized weights ...) that would not be computed faithfully.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(
            "config.json has no model_type",
            fix="give the folder of a Hugging Face causal language model",
        )
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise UnsupportedError(
            f"unknown architecture {model_type!r}",
            why="each family needs a declaration of its linears in pipeline/architectures",
            fix=did_you_mean(model_type, ARCHITECTURES),
        )
    architecture.check(config)
    return architecture
