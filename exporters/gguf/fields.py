"""GGUF key-value pairs, and checked access to the config.json that they come from."""

from __future__ import annotations

from typing import Any, NamedTuple

from exporters.config_fields import Config, head_dim, integer, number

__all__ = ["Config", "KeyValue", "head_dim", "integer", "number"]


class KeyValue(NamedTuple):
    """One metadata entry.

    Attributes:
        key: Full key, such as ``llama.block_count``.
        kind: Type in the file: uint32, float32, bool or string; ``kind[]`` for an array of them.
        value: Python value or, for arrays, a sequence of them.
    """

    key: str
    kind: str
    value: Any
