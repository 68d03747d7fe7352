"""The embedded demo: a small trained model and text to calibrate and evaluate it on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.demo.stdlib import held_out_sources, shuffled, training_sources
from pipeline.errors import UsageError

__all__ = ["MODEL", "Split", "corpus"]

MODEL = Path(__file__).parent / "model"
Split = Literal["calibration", "evaluation"]
DEFAULT_LIMIT = 2_000_000
DOCUMENT_SEPARATOR = "\n\n"


def corpus(split: Split, limit: int = DEFAULT_LIMIT) -> str:
    """Source code of the running Python's standard library.

    Args:
        split: ``calibration`` takes modules of the kind that the demo model was trained on,
            ``evaluation`` only modules that were held out, with their tests, from its training.
        limit: Characters at most; the text ends with the last whole line before.

    Returns:
        The same text on every call, and on every machine with the same Python.

    Raises:
        InputError: This Python comes without its sources.
        UsageError: An unknown split or a limit that leaves nothing.
    """
    if split == "calibration":
        sources = training_sources(tests=False)
    elif split == "evaluation":
        sources = held_out_sources()
    else:
        raise UsageError(f"unknown split {split!r}", fix="calibration or evaluation")
    text = DOCUMENT_SEPARATOR.join(text for _, text in shuffled(sources))
    if len(text) <= limit:
        return text
    end = text.rfind("\n", 0, limit) + 1
    if end <= 0:
        raise UsageError(f"a corpus of {limit} characters holds no line")
    return text[:end]
