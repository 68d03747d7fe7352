"""Checked access to the config.json of a Hugging Face model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.errors import InputError

Config = Mapping[str, Any]

_UINT32_MAX = 2**32 - 1


def integer(config: Config, key: str, default: int | None = None) -> int:
    """``config[key]`` as a positive integer; `default` where the key is missing or null.

    Raises:
        InputError: No such key and no default, or not an integer in 1..2^32-1.
    """
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value <= _UINT32_MAX:
        raise InputError(
            f"config.json: {key} is {value!r}", why=f"it must be an integer in 1..{_UINT32_MAX}"
        )
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """``config[key]`` as a positive finite number; `default` where the key is missing or null.

    Raises:
        InputError: No such key and no default, or not a finite number above 0.
    """
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(
            f"config.json: {key} is {value!r}", why="it must be a finite number above 0"
        )
    return float(value)


def head_dim(config: Config) -> int:
    """Size of an attention head, with the defaults of transformers.

    Raises:
        InputError: The sizes are missing or contradict each other.
    """
    hidden, heads = integer(config, "hidden_size"), integer(config, "num_attention_heads")
    if config.get("model_type") == "qwen3":
        return integer(config, "head_dim", 128)
    if config.get("head_dim") is None and hidden % heads:
        raise InputError(f"config.json: hidden_size {hidden} does not divide into {heads} heads")
    return integer(config, "head_dim", hidden // heads)
