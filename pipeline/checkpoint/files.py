"""Reading small text files that may be anything but what their name says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from exporters.untrusted import open_regular, shown
from pipeline.errors import InputError

MAX_JSON_BYTES = 100_000_000
LEAD_BYTES = 64

_NOT_THE_FILE = (
    (
        b"version https://git-lfs",
        "a Git-LFS pointer, not the file itself",
        "fetch the content: git lfs pull",
    ),
    (b"<!doctype", "a web page", "the download failed: get the file again"),
    (b"<html", "a web page", "the download failed: get the file again"),
    (b"<?xml", "an XML document", "the download failed: get the file again"),
)


def refuse_stand_in(path: Path, lead: bytes) -> None:
    """Names what downloads leave in the place of a text file.

    Args:
        path: For the message.
        lead: The first `LEAD_BYTES` bytes of the file, or all of a shorter one.

    Raises:
        InputError: Empty, a Git-LFS pointer, or a web page.
    """
    if not lead:
        raise InputError(
            f"{path} is empty", why="the download or copy was interrupted", fix="get it again"
        )
    folded = lead.lstrip().lower()
    for magic, kind, fix in _NOT_THE_FILE:
        if folded.startswith(magic):
            raise InputError(f"{path} is {kind}", fix=fix)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in strict UTF-8 without duplicate keys.

    Parsers differ on duplicate keys, so two programs could read different models from one file.

    Raises:
        InputError: Missing, larger than `MAX_JSON_BYTES`, or anything but such an object.
        ResourceError: No permission to read it.
    """
    with open_regular(path) as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES} bytes")
    refuse_stand_in(path, content[:LEAD_BYTES])
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} holds no valid JSON", why=shown(str(error), 200), fix="get it again"
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"duplicate key {key!r}")
    return result
