"""From whatever ended a command to one clear message and the documented exit code."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

from pipeline.errors import PipelineError, ResourceError
from pipeline.progress import Progress, open_progress
from pipeline.storage import reported

NOTHING_TO_RESUME = 130


@contextmanager
def session(mode: str, *, debug: bool) -> Iterator[Progress]:
    """The frame of a command: progress inside, and every way of failing turned into its exit code.

    SIGTERM ends the command as Ctrl-C does.

    Args:
        mode: Progress mode; in ``json`` an error is the last object instead of text.
        debug: Print the traceback of an error.

    Raises:
        typer.Exit: The command failed, and its message has been printed.
    """
    progress = None
    try:
        with _sigterm_interrupts(), open_progress(mode) as progress:
            yield progress
    except (typer.Exit, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        code, message = diagnose(error)
        if debug:
            traceback.print_exception(error)
        if progress is not None and mode == "json":
            progress.summary({"exit_code": code, "error": message})
        else:
            sys.stderr.write(f"error: {message}\n")
        raise typer.Exit(code) from error


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def diagnose(error: BaseException) -> tuple[int, str]:
    """Exit code and message of what ended a command.

    The message of a bug holds its traceback, unless a note says where that was saved.
    """
    notes = getattr(error, "__notes__", [])
    if isinstance(error, KeyboardInterrupt):
        return NOTHING_TO_RESUME, "interrupted; there is nothing to resume"
    known = _as_expected(error)
    if known is not None:
        return known.exit_code, "\n  ".join([str(known), *notes])
    lines = [f"internal error: {type(error).__name__}: {error}", *notes]
    lines.append("this is a bug in this program; please report it with the traceback")
    if not any(note.startswith("traceback") for note in notes):
        lines.append("".join(traceback.format_exception(error)).rstrip())
    return PipelineError.exit_code, "\n  ".join(lines)


def _as_expected(error: Any) -> PipelineError | None:
    """The failure as one that a user can act on, if it is of such a kind."""
    if isinstance(error, PipelineError):
        return error
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    # PyTorch's CPU allocator raises a bare RuntimeError.
    if out_of_memory or "DefaultCPUAllocator" in str(error):
        return ResourceError(
            "out of memory",
            why=str(error).partition("\n")[0],
            fix="lower --set calibration.batch=1, --samples or --seqlen; if it was tuning, lower "
            "tuning.batch, or set tuning.steps=0: finished blocks are kept",
        )
    if isinstance(error, OSError):
        try:
            with reported(f"use {error.filename or 'a file'}"):
                raise error
        except ResourceError as known:
            return known
        except PipelineError:
            return None
    return None
