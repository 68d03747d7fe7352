"""Rotary position embedding: what transformers computes, in the terms of llama.cpp.

transformers: ``modeling_rope_utils.py``. llama.cpp: ``load_hparams`` in llama-model.cpp, the YaRN
part of llama-context.cpp, ``ggml_rope_cache_init`` in ggml-cpu/ops.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.gguf.fields import Config, KeyValue, head_dim, integer, number
from pipeline.errors import InputError, UnsupportedError

_THETA = 10000.0  # default of transformers for all three families
_ORIGINAL = "original_max_position_embeddings"
_KNOWN = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}),
    "yarn": frozenset({"factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow"}),
}


def rope_metadata(config: Config) -> list[KeyValue]:
    """The ``{arch}.rope.*`` entries.

    Raises:
        InputError: A parameter is missing or makes no sense.
        UnsupportedError: The stock runtime would rotate differently.
    """
    scaling, rope = _parameters(config)
    entries: list[tuple[str, str, Any]] = [
        ("dimension_count", "uint32", head_dim(config)),
        ("freq_base", "float32", number(rope, "rope_theta", _THETA)),
    ]
    if scaling in ("linear", "yarn"):
        entries += [
            ("scaling.type", "string", scaling),
            ("scaling.factor", "float32", number(rope, "factor")),
        ]
    if scaling == "yarn":
        entries += _yarn(rope, integer(config, "max_position_embeddings"))
    if scaling == "llama3" and config["model_type"] != "llama":
        raise UnsupportedError(
            f"llama3 RoPE scaling in a {config['model_type']} model",
            why="llama.cpp reads the frequency factors in its llama graph only",
        )
    prefix = config["model_type"]
    return [KeyValue(f"{prefix}.rope.{key}", kind, value) for key, kind, value in entries]


def rope_factors(config: Config) -> NDArray[np.float32] | None:
    """Tensor ``rope_freqs.weight``: what llama.cpp divides the rotary frequencies by.

    Returns:
        float32 [head_dim / 2] for llama3 RoPE scaling, otherwise None.

    Raises:
        InputError: A parameter is missing or makes no sense.
        UnsupportedError: The stock runtime would rotate differently.
    """
    scaling, rope = _parameters(config)
    if scaling != "llama3":
        return None
    factor, original = number(rope, "factor"), number(rope, _ORIGINAL)
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if low >= high:
        raise InputError(f"config.json: low_freq_factor {low} is not below high_freq_factor {high}")
    dimensions = head_dim(config)
    theta = number(rope, "rope_theta", _THETA)
    frequencies = theta ** (-np.arange(0, dimensions, 2) / dimensions)
    periods = original * frequencies / (2 * math.pi)  # turns within the original context
    kept = np.clip((periods - low) / (high - low), 0, 1)
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


def _parameters(config: Config) -> tuple[str, Mapping[str, Any]]:
    """RoPE type and parameters, wherever transformers 4 or 5 wrote them."""
    merged = {"rope_theta": config.get("rope_theta")}
    for section in ("rope_scaling", "rope_parameters"):
        found = config.get(section) or {}
        if not isinstance(found, Mapping):
            raise InputError(f"config.json: {section} is {found!r}", why="it must be an object")
        merged.update((key, value) for key, value in found.items() if value is not None)
    kind = merged.pop("rope_type", None) or merged.pop("type", None) or "default"
    merged.pop("type", None)
    partial = merged.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(
            f"partial_rotary_factor {partial!r}", why="llama.cpp rotates whole heads here"
        )
    if kind not in _KNOWN:
        raise UnsupportedError(
            f"RoPE type {kind!r}",
            why="stock llama.cpp cannot reproduce it",
            fix=f"supported: {', '.join(_KNOWN)}",
        )
    unknown = merged.keys() - _KNOWN[kind] - {"rope_theta"}
    if unknown:
        raise UnsupportedError(
            f"parameters of RoPE type {kind!r}: {', '.join(sorted(unknown))}",
            why="dropping them could change what the model computes",
        )
    return kind, merged


def _yarn(rope: Config, context: int) -> list[tuple[str, str, Any]]:
    # Only other architectures of llama.cpp read these two from the file.
    fixed = {"beta_fast": 32, "beta_slow": 1}
    for key, value in fixed.items():
        if rope.get(key, value) != value:
            raise UnsupportedError(
                f"YaRN with {key} {rope[key]!r}", why=f"llama.cpp always uses {value} here"
            )
    entries: list[tuple[str, str, Any]] = [
        ("scaling.original_context_length", "uint32", integer(rope, _ORIGINAL, context))
    ]
    # transformers multiplies cos and sin by attention_factor (YaRN, arXiv 2309.00071, section 3.4);
    # llama.cpp multiplies its own magnitude by this entry.
    magnitude = _magnitude(number(rope, "factor"))
    correction = number(rope, "attention_factor", magnitude) / magnitude
    if correction != 1:
        entries.append(("scaling.attn_factor", "float32", correction))
    return entries


def _magnitude(factor: float) -> float:
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
