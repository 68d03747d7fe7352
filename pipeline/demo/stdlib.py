"""The demo corpus: the source code of Python's own standard library, always at hand.

Licence: the Python Software Foundation's; the text never leaves the Python it comes from.
"""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.errors import InputError

# Modules that the demo model was never trained on, nor on their tests.
HELD_OUT = (
    "statistics.py",
    "fractions.py",
    "difflib.py",
    "textwrap.py",
    "heapq.py",
    "csv.py",
    "shelve.py",
    "cmd.py",
    "sched.py",
    "calendar.py",
    "colorsys.py",
    "ftplib.py",
    "imaplib.py",
    "mailbox.py",
    "optparse.py",
    "pickletools.py",
    "plistlib.py",
    "poplib.py",
    "smtplib.py",
    "turtle.py",
    "webbrowser.py",
    "datetime.py",
    "decimal.py",
    "_pydecimal.py",
    "_pydatetime.py",
    "tarfile.py",
    "zipfile.py",
)
_HELD_OUT_STEMS = frozenset(name.removesuffix(".py") for name in HELD_OUT)
MIN_CHARACTERS = 500
# Installed packages, code tables, and a test tree that is data for a parser.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "idle_test"}
)


def held_out_sources() -> list[tuple[str, str]]:
    """(path, text) of the held-out modules that this Python has, sorted by path.

    Raises:
        InputError: This Python comes without its sources.
    """
    return _read(path for path in _paths() if path in HELD_OUT)


def training_sources(*, tests: bool) -> list[tuple[str, str]]:
    """(path, text) of the modules that a model may be trained or calibrated on, sorted by path.

    A held-out module stays out under any name: as a package (``zipfile/`` since Python 3.12), and
    as its tests.

    Args:
        tests: Include ``test/``, which some distributions of Python leave out.

    Raises:
        InputError: This Python comes without its sources.
    """
    return _read(
        path for path in _paths() if not _held_out(path) and (tests or not path.startswith("test/"))
    )


def shuffled(sources: list[tuple[str, str]], seed: int = 0) -> list[tuple[str, str]]:
    """The same modules in an order that depends on nothing but the seed."""
    order = list(sources)
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, not a secret
    return order


def _held_out(path: str) -> bool:
    module = path.removeprefix("test/").removeprefix("test_").partition("/")[0]
    file = path.rpartition("/")[2]
    is_its_test = file.startswith("test_") and file.removeprefix("test_") in HELD_OUT
    return is_its_test or module.removesuffix(".py") in _HELD_OUT_STEMS


def _root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _paths() -> Iterator[str]:
    """Every module of the standard library, relative to its root."""
    for folder, folders, names in os.walk(_root()):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in names:
            path = (Path(folder) / name).relative_to(_root()).as_posix()
            if path.endswith(".py") and not path.startswith("lib2to3/tests/"):
                yield path


def _read(paths: Iterable[str]) -> list[tuple[str, str]]:
    found = [(path, _text(_root() / path)) for path in sorted(paths)]
    kept = [(path, text) for path, text in found if len(text) >= MIN_CHARACTERS]
    if not kept:
        raise InputError(
            "this Python has no sources of its standard library, so there is no demo corpus",
            why=f"no .py files of it under {_root()} (a zipped or stripped installation)",
            fix="give text files for calibration and evaluation, or use an ordinary Python",
        )
    return kept


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
