"""JSON that every parser accepts: Python's own would write NaN and Infinity, which JSON lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON text of nested mappings, sequences, texts and numbers.

    Args:
        value: The data; figures that are not finite become null, paths become texts.
        indent: Spaces a level; one line if None.
    """
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, PurePath) else value
