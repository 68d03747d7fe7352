"""Sizes of files as people write them: ``15MB``, ``14.5 MiB``, ``15000000``."""

from __future__ import annotations

import re
from fractions import Fraction

UNITS = {
    "": 1,
    **{f"{prefix}{b}": 1000**n for n, prefix in enumerate("KMGT", 1) for b in ("", "B")},
    **{f"{prefix}IB": 1024**n for n, prefix in enumerate("KMGT", 1)},
    "B": 1,
}
"""Bytes by unit in upper case; K, M, G and T are decimal, KiB, MiB, GiB and TiB binary."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size with or without a unit, rounded down.

    Raises:
        ValueError: Not a size, or an unknown unit.
    """
    found = _SIZE.fullmatch(text)
    unit = found[2].upper() if found else ""
    if found is None or unit not in UNITS:
        raise ValueError(f"{text!r} is no size such as 15MB, 14.5MiB or 15000000")
    return int(Fraction(found[1]) * UNITS[unit])


def size_label(size: int) -> str:
    """A size for names of files, exact: ``15MB``, ``1500KB``, ``15000001B``."""
    for unit in ("GB", "MB", "KB"):
        if size and size % UNITS[unit] == 0:
            return f"{size // UNITS[unit]}{unit}"
    return f"{size}B"
