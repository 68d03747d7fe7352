"""Text from data sets on the Hugging Face hub, through the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

DOCUMENT_SEPARATOR = "\n\n"  # how the GPTQ papers join the lines of WikiText-2
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[^:]*){0,3}\Z", re.ASCII)
_FILE_SUFFIXES = (".txt", ".text", ".md")
_FIX = "give a text file (--calibration FILE), or `stdlib`, which is always at hand"


@dataclass(frozen=True)
class DatasetSpec:
    """A column of a split of a data set.

    Attributes:
        name: ``owner/name`` on the hub.
        config: Configuration, or None for the only one.
        splits: Split to read: the first of these that exists.
        column: Column with the text; None: ``text``, or else the only column of strings.
        data_files: Read only these files of the repository.
    """

    name: str
    config: str | None = None
    splits: tuple[str, ...] = ("train",)
    column: str | None = None
    data_files: str | None = None

    @classmethod
    def parse(cls, text: str, use: str) -> DatasetSpec:
        """A spec from ``owner/name[:config][:split][:column]``; empty parts are defaults.

        Args:
            text: What the user wrote.
            use: ``calibration`` (default split ``train``) or ``evaluation`` (``test``, else
                ``validation``).
        """
        name, config, split, column = (*text.split(":"), "", "", "")[:4]
        default = ("train",) if use == "calibration" else ("test", "validation")
        return cls(name, config or None, (split,) if split else default, column or None)


_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_C4 = "allenai/c4"

PRESETS: Mapping[str, Mapping[str, DatasetSpec]] = {
    "wikitext2": {
        "calibration": DatasetSpec(*_WIKITEXT, splits=("train",), column="text"),
        "evaluation": DatasetSpec(*_WIKITEXT, splits=("test",), column="text"),
    },
    # Each file becomes a split of its own; the first shard of each is what the papers use.
    "c4": {
        "calibration": DatasetSpec(
            _C4, column="text", data_files="en/c4-train.00000-of-01024.json.gz"
        ),
        "evaluation": DatasetSpec(
            _C4, column="text", data_files="en/c4-validation.00000-of-00008.json.gz"
        ),
    },
}


def is_dataset_name(text: str) -> bool:
    """Whether `text` reads as ``owner/name[:config][:split][:column]``, not as a text file."""
    return _NAME.match(text) is not None and not text.lower().endswith(_FILE_SUFFIXES)


def read_dataset(spec: DatasetSpec, limit: int) -> str:
    """Rows of the column, joined by blank lines, until `limit` characters are reached.

    Raises:
        InputError: The data set cannot be reached, or has no such split or column.
    """
    rows = _load(spec)
    column = _column(rows, spec)
    return DOCUMENT_SEPARATOR.join(_until((row[column] or "" for row in rows), limit))


def _until(rows: Iterable[str], limit: int) -> Iterable[str]:
    total = 0
    for row in rows:
        if total >= limit:
            return
        total += len(row) + len(DOCUMENT_SEPARATOR)
        yield row


def _load(spec: DatasetSpec) -> Dataset:
    import datasets

    options: dict[str, Any] = {"data_files": spec.data_files} if spec.data_files else {}
    cause: Exception | None = None
    for split in spec.splits:
        try:
            return datasets.load_dataset(spec.name, spec.config, split=split, **options)
        except ValueError as error:  # what it raises for a split that does not exist
            cause = cause or error
        except Exception as error:  # the errors of whichever HTTP library it is built on
            cause = error
            break
    lines = str(cause).strip().splitlines() or [repr(cause)]
    raise InputError(
        f"cannot read the data set {spec.name} (split {' or '.join(spec.splits)})",
        why=f"there is no file of that name here, and from the hub: {lines[0]}",
        fix=_FIX,
    ) from cause


def _column(rows: Dataset, spec: DatasetSpec) -> str:
    strings = [
        name
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    if spec.column is not None:
        choice = spec.column
    elif "text" in strings or len(strings) != 1:
        choice = "text"
    else:
        choice = strings[0]
    if choice not in strings:
        raise InputError(
            f"data set {spec.name} has no text column {choice!r}",
            why=f"columns of strings: {', '.join(strings) or 'none'}",
            fix="name one: owner/name:config:split:column",
        )
    return choice
