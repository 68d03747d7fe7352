"""Rotary position embedding parameters in one spelling, whoever wrote the config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.errors import InputError, UnsupportedError
from pipeline.suggest import did_you_mean

DEFAULT_THETA = 10000.0  # transformers' default for all three families

# What each type reads: required parameters, then optional ones (transformers, modeling_rope_utils).
PARAMETERS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset(
            {
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            }
        ),
        frozenset(),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
        ),
    ),
}


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE parameters in the flat form of transformers 5.

    transformers 4 writes ``rope_theta`` and ``rope_scaling`` (whose type was once called ``type``),
    transformers 5 one ``rope_parameters``.

    Returns:
        ``rope_type``, ``rope_theta`` and the numbers that the type needs; nothing else.

    Raises:
        InputError: A parameter is missing, not a positive number, or given twice differently.
        UnsupportedError: An unknown type, a parameter that the type does not read, or a rotation of
            only a part of each head.
    """
    merged: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        section = config.get(key)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise InputError(f"config.json: {key} is {section!r}", why="it must be an object")
        for name, value in section.items():
            _merge(merged, "rope_type" if name == "type" else name, value)
    for key in ("rope_theta", "partial_rotary_factor"):
        if config.get(key) is not None:
            _merge(merged, key, config[key])
    return _checked(merged)


def _merge(merged: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        return
    if merged.setdefault(name, value) != value:
        raise InputError(
            f"config.json contradicts itself: {name} is {merged[name]!r} and {value!r}",
            why="RoPE parameters are given twice (rope_theta, rope_scaling, rope_parameters)",
            fix="remove the wrong one",
        )


def _checked(merged: dict[str, Any]) -> dict[str, Any]:
    rope_type = merged.pop("rope_type", "default")
    if not isinstance(rope_type, str) or rope_type not in PARAMETERS:
        raise UnsupportedError(
            f"unsupported RoPE type {rope_type!r}", fix=did_you_mean(str(rope_type), PARAMETERS)
        )
    if merged.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedError("unsupported: only a part of each head is rotated (RoPE)")
    theta = merged.pop("rope_theta", DEFAULT_THETA)
    required, optional = PARAMETERS[rope_type]
    missing = required - merged.keys()
    if missing:
        raise InputError(f"config.json: RoPE type {rope_type!r} lacks {', '.join(sorted(missing))}")
    unknown = merged.keys() - required - optional
    if unknown:
        raise UnsupportedError(
            f"unsupported RoPE parameters for type {rope_type!r}: {', '.join(sorted(unknown))}",
            why="leaving them out could change what the model computes",
        )
    numbers = {"rope_theta": theta, **merged}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise InputError(f"config.json: {name} is {value!r}", why="it must be a number above 0")
    return {"rope_type": rope_type, **numbers}
