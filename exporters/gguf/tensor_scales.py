"""Scales of whole tensors, which multiply a linear's outputs: ``<linear>.scale``, float32 [1].

llama.cpp loads one for every linear of every architecture; whether it is used is up to the graph
(src/models/*.cpp, `build_ffn` in src/llama-graph.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCALED_TYPES = ("NVFP4",)
"""Types whose tensors have such a scale."""

_EMBEDDING = "token_embd.weight"
_FFN = (".ffn_gate.", ".ffn_up.", ".ffn_down.")


def scale_name(weight: str) -> str:
    """GGUF name of the scale of a tensor ``<linear>.weight``."""
    return f"{weight.removesuffix('.weight')}.scale"


def why_unscaled(config: Mapping[str, Any], weight: str, *, biased: bool) -> str | None:
    """Why stock llama.cpp computes without, or with a wrong use of, the scale of a tensor.

    Args:
        config: Content of the model's config.json.
        weight: GGUF name of the tensor.
        biased: Whether its linear has a bias.

    Returns:
        None if it multiplies the outputs by the scale, before a bias.
    """
    if weight == _EMBEDDING:
        return "llama.cpp looks rows of the embedding up and has no scale for them"
    if not any(part in weight for part in _FFN):
        return None
    if config["model_type"] == "qwen2":
        return "llama.cpp's qwen2 graph leaves the scales of ffn_gate, ffn_up and ffn_down out"
    return "llama.cpp adds an FFN's bias before it scales, and stops" if biased else None
