"""First contact with a file nobody has vouched for: open it, name what it is, quote it safely."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import InputError, ResourceError

HEAD_BYTES = 512  # enough to recognise every kind of file named below
_MAX_PLAUSIBLE_LENGTH = 1 << 48  # eight characters of text read as a number are 2^56 or more

_ALIENS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git-LFS pointer, not the file itself",
        "fetch the content: git lfs pull",
    ),
    (
        b"PK\x03\x04",
        "a zip archive (the container of PyTorch .bin/.pt checkpoints)",
        "convert it to safetensors; pickled checkpoints can run code and are refused",
    ),
    (
        b"\x80",
        "a Python pickle",
        "convert it to safetensors; pickles can run code and are refused",
    ),
    (b"FUGG", "a big-endian GGUF file", "export it again on a little-endian machine"),
    (b"lmgg", "a GGML file, the predecessor of GGUF", "convert it to GGUF"),
    (b"fmgg", "a GGMF file, the predecessor of GGUF", "convert it to GGUF"),
    (b"tjgg", "a GGJT file, the predecessor of GGUF", "convert it to GGUF"),
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


def shown(text: str, limit: int = 80) -> str:
    """Text from an untrusted file for a terminal: shortened, control characters escaped.

    Args:
        text: Any string.
        limit: Characters of `text` to keep; the number left out is appended.
    """
    kept = text[:limit]
    safe = "".join(
        ch if ch.isprintable() else ch.encode("unicode_escape", "backslashreplace").decode()
        for ch in kept
    )
    return safe if len(text) <= limit else f"{safe}... (+{len(text) - limit} characters)"


def quoted(name: str) -> str:
    """A name from an untrusted file, between quotes, safe to print."""
    return f"'{shown(name)}'"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; pipes and devices, which can block for ever, are refused.

    Raises:
        InputError: Missing, a folder, or not a regular file.
        ResourceError: No permission to read it.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder", fix="name one file")
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is not a regular file")
        return path.open("rb")
    except PermissionError as error:
        raise ResourceError(f"cannot read {path}", why=str(error.strerror)) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise InputError(f"cannot open {shown(str(path), 200)}", why=str(error)) from error


def container_of(head: bytes, path: Path) -> str:
    """The container kind that the first bytes of a file declare: ``gguf`` or ``safetensors``.

    Args:
        head: The first `HEAD_BYTES` of the file, or all of it if it is shorter.
        path: Used in messages only; the extension plays no part.

    Raises:
        InputError: Empty, or some other kind of file, which is named.
    """
    if not head:
        raise InputError(f"{path} is empty", fix="download or export it again")
    if head.startswith(b"GGUF"):
        return "gguf"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MAX_PLAUSIBLE_LENGTH:
        return "safetensors"
    for magic, kind, fix in _ALIENS:
        if head.startswith(magic):
            raise InputError(f"{path} is {kind}", fix=fix)
    if head.lstrip().lower().startswith(_MARKUP):
        raise InputError(
            f"{path} is a web page (HTML or XML)",
            why="the download most likely saved an error or login page",
            fix="download it again",
        )
    raise InputError(
        f"{path} is neither GGUF nor safetensors",
        why=f"it begins with {head[:8]!r}",
        fix="name a .gguf or .safetensors file",
    )
