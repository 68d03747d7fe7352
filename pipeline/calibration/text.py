"""Where calibration and evaluation text comes from."""

from __future__ import annotations

import codecs
import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipeline.calibration.hub_datasets import PRESETS, DatasetSpec, is_dataset_name, read_dataset
from pipeline.demo import corpus
from pipeline.errors import InputError
from pipeline.suggest import did_you_mean

Split = Literal["calibration", "evaluation"]

STDLIB = "stdlib"
DEFAULT_LIMIT = 16_000_000
PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class TextSource:
    """A text and where it is from.

    Attributes:
        name: What the user asked for.
        split: What it is used for.
        text: Never empty.
        truncated: Whether the source holds more than was taken.
        part: Which part of a text that serves both uses; empty for a text of its own.
    """

    name: str
    split: Split
    text: str
    truncated: bool = False
    part: str = ""

    @cached_property
    def sha256(self) -> str:
        """Digest of the text in UTF-8."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def load_text(source: str, split: Split, *, limit: int = DEFAULT_LIMIT) -> TextSource:
    """Text by name.

    Args:
        source: ``stdlib`` (source code of the running Python), a plain text file in UTF-8, a preset
            (``wikitext2``, ``c4``), or a hub data set ``owner/name[:config][:split][:column]``.
        split: What the text is for. A plain file has no splits and gives all it has; use
            `load_texts` to get two texts that do not overlap.
        limit: Characters to take at most; more is left out and reported as `truncated`.

    Raises:
        InputError: No such source, it cannot be reached, or it holds no text.
    """
    path = Path(source).expanduser()
    if source == STDLIB:
        text = corpus(split)
    elif source in PRESETS:
        text = read_dataset(PRESETS[source][split], limit + 1)
    elif path.exists():
        text = read_text_file(path, limit + 1)
    elif is_dataset_name(source):
        text = read_dataset(DatasetSpec.parse(source, split), limit + 1)
    else:
        raise InputError(
            f"no such text: {source}",
            why="there is no such file, and it is no data set name (owner/name)",
            fix=did_you_mean(source, (STDLIB, *PRESETS)),
        )
    if not text.strip():
        raise InputError(f"{source} holds no text")
    return TextSource(source, split, text[:limit], truncated=len(text) > limit)


def load_texts(
    calibration: str, evaluation: str | None = None, *, limit: int = DEFAULT_LIMIT
) -> tuple[TextSource, TextSource]:
    """Calibration and evaluation text that never overlap.

    A source without splits of its own (a plain file, a data set with an explicit split) that has to
    serve both uses is cut in two by `split_text`.

    Args:
        calibration: As in `load_text`.
        evaluation: The same; None takes it from the calibration source.
        limit: Characters of each at most.

    Raises:
        InputError: As `load_text`, or one text too short to be cut.
    """
    first = load_text(calibration, "calibration", limit=limit)
    second = load_text(evaluation or calibration, "evaluation", limit=limit)
    if first.text != second.text:
        return first, second
    head, tail = split_text(first.text)
    return (
        replace(first, text=head, part="first nine tenths"),
        replace(second, text=tail, part="last tenth"),
    )


def split_text(text: str, fraction: float = 0.1) -> tuple[str, str]:
    """Cuts one text into calibration and evaluation text at a paragraph boundary.

    Args:
        text: Any text.
        fraction: Share of the evaluation text, which is the end of `text`.

    Returns:
        (calibration, evaluation); together exactly `text`.

    Raises:
        InputError: No boundary leaves text on both sides.
    """
    ideal = round(len(text) * (1.0 - fraction))
    for boundary in (PARAGRAPH, "\n", " "):
        before = text.rfind(boundary, 0, ideal)
        after = text.find(boundary, max(0, ideal - len(boundary) + 1))
        ends = [found + len(boundary) for found in (before, after) if found >= 0]
        for end in sorted(ends, key=lambda end: abs(end - ideal)):
            head, tail = text[:end], text[end:]
            if head.strip() and tail.strip():
                return head, tail
    raise InputError(
        "the text cannot be cut into calibration and evaluation text",
        why="it has no line or word boundary with text on both sides",
        fix="give two texts",
    )


def read_text_file(path: Path, limit: int) -> str:
    """The first `limit` characters of a UTF-8 file, or more; newlines stay as they are.

    Raises:
        InputError: Not a readable UTF-8 file; names the first bad byte.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder", fix="give one text file")
    enough = 4 * limit  # bytes of the longest UTF-8 sequence
    try:
        with path.open("rb") as file:
            content = file.read(enough)
        return codecs.getincrementaldecoder("utf-8")().decode(content, len(content) < enough)
    except OSError as error:
        raise InputError(f"cannot read {path}", why=str(error)) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text",
            why=f"byte {error.start}: {error.reason}",
            fix="convert it to UTF-8",
        ) from error
