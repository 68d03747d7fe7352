"""Did-you-mean hints."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_NEAR = 0.55


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, the first of equals; None if none is near.

    Args:
        word: What the user wrote. Case does not count.
        known: Every accepted spelling.
    """

    def likeness(name: str) -> float:
        return SequenceMatcher(None, word.casefold(), name.casefold()).ratio()

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= _NEAR else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word: the nearest known one, if any is near, and the list of all.

    Args:
        word: What the user wrote.
        known: Every accepted spelling.
    """
    names = list(known)
    near = nearest(word, names)
    hint = f"did you mean {near}? " if near else ""
    return f"{hint}known: {', '.join(names) or 'none yet'}"
