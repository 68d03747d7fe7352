"""Hugging Face tensor names -> GGUF names, the row order that the llama graph expects, and which
tensors may have a scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError, UnsupportedError

Scalar = TypeVar("Scalar", bound=np.generic)

_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SCALED_TYPES = ("NVFP4",)
"""Types whose tensors have a scale as a whole, see `scale_name`."""

_LINEARS = frozenset(name for name in _BLOCK if name.endswith("_proj"))
_BLOCK_NAME = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.([a-z_.]+)\.(weight|bias)\Z")
_FFN = (".ffn_gate.", ".ffn_up.", ".ffn_down.")
_QUERY_OR_KEY = re.compile(r"blk\.[0-9]+\.attn_([qk])\.(?:weight|bias)\Z")


def gguf_name(hf_name: str) -> str:
    """The GGUF name of a parameter of a llama, qwen2 or qwen3 checkpoint.

    Raises:
        InputError: `hf_name` is empty or not text.
        UnsupportedError: llama.cpp has no tensor for this parameter.
    """
    if not isinstance(hf_name, str) or not hf_name:
        raise InputError(f"a tensor name must be a non-empty text, not {hf_name!r}")
    if hf_name in _MODEL:
        return _MODEL[hf_name]
    match = _BLOCK_NAME.match(hf_name)
    if match is not None:
        block, module, kind = match.groups()
        if module in _BLOCK and (kind == "weight" or module in _LINEARS):
            return f"blk.{block}.{_BLOCK[module]}.{kind}"
    raise UnsupportedError(
        f"llama.cpp has no tensor for {hf_name!r}",
        why="the llama, qwen2 and qwen3 graphs are dense decoders with gated MLPs",
        fix="export a plain LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM checkpoint",
    )


def scale_name(weight: str) -> str:
    """GGUF name of the scale of a tensor ``<linear>.weight``: float32 [1], multiplies outputs.

    llama.cpp loads one for every linear of every architecture; whether it is used is up to the
    graph (src/models/*.cpp, `build_ffn` in src/llama-graph.cpp).
    """
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
    if weight == _MODEL["model.embed_tokens.weight"]:
        return "llama.cpp looks rows of the embedding up and has no scale for them"
    if not any(part in weight for part in _FFN):
        return None
    if config["model_type"] == "qwen2":
        return "llama.cpp's qwen2 graph leaves the scales of ffn_gate, ffn_up and ffn_down out"
    return "llama.cpp adds an FFN's bias before it scales, and stops" if biased else None


def rope_heads(config: Mapping[str, Any], gguf_name: str) -> int | None:
    """Heads to give `permute_rope` for this tensor; None if its rows stay as they are.

    The llama graph rotates neighbouring pairs (0, 1), (2, 3), ... of a head, Hugging Face models
    rotate (0, n/2), (1, n/2 + 1), ... as the qwen graphs do.
    """
    match = _QUERY_OR_KEY.match(gguf_name)
    if match is None or config["model_type"] != "llama":
        return None
    queries = int(config["num_attention_heads"])
    return queries if match[1] == "q" else int(config.get("num_key_value_heads") or queries)


def permute_rope(rows: NDArray[Scalar], heads: int) -> NDArray[Scalar]:
    """Reorders the rows of each head from half-split to interleaved rotary pairs.

    Blocks of ggml types lie within a row, so this commutes with packing.

    Args:
        rows: [heads * head_dim, ...]: float rows, packed bytes or a bias.
        heads: Heads stacked along the first axis (key-value heads for keys).

    Returns:
        Same shape and dtype, C-contiguous.

    Raises:
        InputError: The rows do not divide into `heads` heads of an even size.
    """
    if heads <= 0 or rows.shape[0] % (2 * heads):
        raise InputError(f"{rows.shape[0]} rows do not divide into {heads} heads of an even size")
    split = rows.reshape(heads, 2, rows.shape[0] // (2 * heads), *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)
