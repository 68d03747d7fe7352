"""Settings of a config that change what a model computes, and that nothing here computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.architectures.rope import rope_parameters
from pipeline.errors import InputError, UnsupportedError


def check_config(
    config: Mapping[str, Any],
    model_class: str,
    rope_types: frozenset[str],
    refused_flags: frozenset[str],
) -> None:
    """Refuses what would otherwise be computed wrongly without a word.

    Args:
        config: The content of ``config.json``.
        model_class: The transformers class that the checkpoint must be made for.
        rope_types: RoPE types that the family's stock runtimes compute.
        refused_flags: Config flags that must be off.

    Raises:
        InputError: The config is malformed.
        UnsupportedError: Names the setting that is not supported.
    """
    _check_class(config, model_class)
    _check_unquantized(config)
    _check_rope(config, rope_types)
    _check_attention(config)
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(
            f"unsupported activation {activation!r}", why="only silu (SwiGLU) is computed"
        )
    if config.get("pretraining_tp", 1) not in (1, None):
        raise UnsupportedError(
            f"unsupported: pretraining_tp is {config['pretraining_tp']!r}",
            why="it splits every linear and changes the arithmetic",
        )
    _check_number(config, "rms_norm_eps", (int, float))
    _check_number(config, "max_position_embeddings", (int,))
    for flag in sorted(refused_flags):
        if config.get(flag):
            raise UnsupportedError(
                f"unsupported: {flag} is set for a {config.get('model_type')} model",
                why="stock runtimes do not load those biases for this family",
            )


def _check_number(config: Mapping[str, Any], key: str, kinds: tuple[type, ...]) -> None:
    value = config.get(key)
    if value is not None and (type(value) not in kinds or not 0 < value < float("inf")):
        raise InputError(f"config.json: {key} is {value!r}", why="it must be a number above 0")


def _check_class(config: Mapping[str, Any], model_class: str) -> None:
    classes = config.get("architectures") or [model_class]
    if not isinstance(classes, list):
        raise InputError(f"config.json: architectures is {classes!r}", why="it must be a list")
    if model_class not in classes:
        raise UnsupportedError(
            f"unsupported model class: {', '.join(map(str, classes))}",
            why=f"a {config.get('model_type')} checkpoint must be a {model_class}",
        )


def _check_unquantized(config: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            raise UnsupportedError(
                f"the checkpoint is already quantized (config.json has {key})",
                fix="give the original full-precision checkpoint",
            )


def _check_rope(config: Mapping[str, Any], rope_types: frozenset[str]) -> None:
    rope_type = rope_parameters(config)["rope_type"]
    if rope_type not in rope_types:
        raise UnsupportedError(
            f"unsupported RoPE type {rope_type!r} for {config.get('model_type')}",
            why="stock runtimes do not compute it for this family",
            fix=f"supported: {', '.join(sorted(rope_types))}",
        )


def _check_attention(config: Mapping[str, Any]) -> None:
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise InputError(f"config.json: layer_types is {kinds!r}", why="it must be a list")
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in kinds):
        raise UnsupportedError("unsupported: sliding-window attention is enabled")
