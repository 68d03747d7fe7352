"""What a run is doing, as one stream of events that a terminal, a log or a program can follow.

Stages say what happens through `Progress`; a renderer shows it: a live line on a terminal, plain
lines elsewhere, JSON lines for programs. Nothing here is written to standard output.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from pipeline.errors import UsageError
from pipeline.json_text import json_text
from pipeline.suggest import did_you_mean

if TYPE_CHECKING:
    from rich.status import Status

MODES = ("auto", "plain", "json", "quiet")


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: ``stage``, ``block`` (one begins), ``block_done``, ``stage_done``, ``note``,
            ``warning`` or ``summary``.
        text: Name of the stage, or the message.
        index: Number of the stage or block, from 1; 0 if it has none.
        total: How many there are.
        data: ``seconds``, ``eta_s``, ``figures``, ``memory_bytes``, ``peak_bytes`` as they apply.
    """

    kind: str
    text: str
    index: int = 0
    total: int = 0
    data: dict[str, Any] = field(default_factory=dict)


class Renderer(Protocol):
    """Shows events."""

    def show(self, event: Event) -> None:
        """Show one event."""

    def close(self) -> None:
        """Let go of the terminal."""


class Progress:
    """Reports where a run is. A context manager; closing ends the stage and the display.

    Args:
        renderer: Where events go.

    Attributes:
        timings: Seconds of each finished stage.
        warnings: Every warning so far.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.timings: dict[str, float] = {}
        self.warnings: list[str] = []
        self._renderer = renderer
        self._stage = ""
        self._stage_start = 0.0
        self._block: tuple[int, int] | None = None
        self._block_start = 0.0
        self._block_seconds: list[float] = []
        self._figures: dict[str, float | str] = {}

    def stage(self, name: str, i: int, n: int) -> None:
        """Stage `i` of `n` (from 1) begins; the one before it is over."""
        self._end_stage()
        self._stage, self._stage_start = name, time.monotonic()
        self._block_seconds = []
        self._emit("stage", name, i, n)

    def phase(self, name: str) -> None:
        """A part of the stage begins whose blocks take another time than those before."""
        self._end_block()
        self._block_seconds = []
        self._emit("note", name)

    def block(self, i: int, n: int, *, resumed: bool = False) -> None:
        """Block `i` of `n` (from 1) of this stage begins; the one before it is over.

        Args:
            i: Number of the block.
            n: How many blocks the stage has.
            resumed: The block was finished by an earlier run: its time says nothing about the next.
        """
        self._end_block()
        if not resumed:
            self._block, self._block_start = (i, n), time.monotonic()
        self._emit("block", "resumed" if resumed else "", i, n, eta_s=self._eta(n - i + 1))

    def figure(self, name: str, value: float | str) -> None:
        """A figure of the present block (the error of a site), shown when the block ends."""
        self._figures[name] = value

    def note(self, text: str) -> None:
        """Something worth knowing."""
        self._emit("note", text)

    def warning(self, text: str) -> None:
        """Something done differently from what was asked, or that may surprise."""
        self.warnings.append(text)
        self._emit("warning", text)

    def abandon(self) -> None:
        """The present stage failed or was interrupted: it has no end to report."""
        self._stage, self._block = "", None

    def summary(self, data: dict[str, Any]) -> None:
        """The last event of a run: its result or its error, for programs that follow it."""
        self._end_stage()
        self._renderer.show(Event("summary", "", data=data))

    def close(self) -> None:
        """End the stage and the display."""
        self._end_stage()
        self._renderer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abandon()
        self.close()

    def _end_stage(self) -> None:
        self._end_block()
        if self._stage:
            seconds = time.monotonic() - self._stage_start
            self.timings[self._stage] = self.timings.get(self._stage, 0.0) + seconds
            self._emit("stage_done", self._stage, seconds=seconds)
            self._stage = ""

    def _end_block(self) -> None:
        if self._block is not None:
            i, n = self._block
            seconds = time.monotonic() - self._block_start
            self._block_seconds.append(seconds)
            eta_s = self._eta(n - i)
            self._emit("block_done", "", i, n, seconds=seconds, eta_s=eta_s, figures=self._figures)
        self._block, self._figures = None, {}

    def _eta(self, blocks_left: int) -> float | None:
        """Seconds for the blocks that are left, from the mean of those measured."""
        if not self._block_seconds:
            return None
        return blocks_left * sum(self._block_seconds) / len(self._block_seconds)

    def _emit(self, kind: str, text: str, index: int = 0, total: int = 0, **data: Any) -> None:
        memory, peak = memory_bytes()
        data |= {"memory_bytes": memory, "peak_bytes": peak}
        self._renderer.show(Event(kind, text, index, total, data))


def memory_bytes() -> tuple[int, int]:
    """Resident memory of this process, now and at its peak (twice the peak without /proc)."""
    with suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines if line.startswith("Vm"))
        now, peak = (int(sizes[key].split()[0]) << 10 for key in ("VmRSS", "VmHWM"))
        return now, peak
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak, peak


def open_progress(mode: str = "auto", stream: IO[str] | None = None) -> Progress:
    """Progress in one of `MODES`.

    Args:
        mode: ``auto`` is a live line on a terminal and ``plain`` elsewhere.
        stream: Where to; standard error unless given.

    Raises:
        UsageError: Unknown mode.
    """
    if mode not in MODES:
        raise UsageError(f"unknown progress mode {mode!r}", fix=did_you_mean(mode, MODES))
    stream = stream or sys.stderr
    if mode == "auto" and stream.isatty():
        return Progress(LiveLine(stream))
    line_of = {"json": json_line, "quiet": warning_line}.get(mode, plain_line)
    return Progress(Lines(stream, line_of))


class Lines:
    """One line for each event that `line_of` gives a line to."""

    def __init__(self, stream: IO[str], line_of: Callable[[Event], str]) -> None:
        self._stream = stream
        self._line_of = line_of

    def show(self, event: Event) -> None:
        """Write the event's line, if it has one."""
        line = self._line_of(event)
        if line:
            self._stream.write(f"{line}\n")
            self._stream.flush()

    def close(self) -> None:
        """Nothing to let go of."""


class LiveLine:
    """Plain lines for what is over, above one live line for what is going on."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False)
        self._status: Status | None = None
        self._stage = ""

    def show(self, event: Event) -> None:
        """Update the live line, and print what is over."""
        if event.kind == "stage":
            self._stage = f"[{event.index}/{event.total}] {event.text}"
        line = plain_line(event) if event.kind != "stage" else ""
        if line:
            style = {"warning": "yellow", "stage_done": "green"}.get(event.kind, "dim")
            self._console.print(line, style=style, markup=False)
        if event.kind in ("stage", "block"):
            self._update(event)
        elif event.kind in ("stage_done", "summary"):
            self.close()

    def close(self) -> None:
        """Remove the live line."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _update(self, event: Event) -> None:
        from rich.text import Text

        parts = [self._stage]
        if event.kind == "block":
            parts += [f"block {event.index}/{event.total}", *_eta_text(event)]
        text = Text("  ".join([*parts, _memory_text(event)]))
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)


def json_line(event: Event) -> str:
    """The event as one JSON object."""
    numbers = {"index": event.index, "total": event.total} if event.total else {}
    return json_text({"event": event.kind, "text": event.text, **numbers, **event.data})


def warning_line(event: Event) -> str:
    """The line of a warning; empty for anything else."""
    return f"warning: {event.text}" if event.kind == "warning" else ""


def plain_line(event: Event) -> str:
    """The line that tells an event; empty for those that need none."""
    seconds = event.data.get("seconds", 0.0)
    if event.kind == "stage":
        return f"[{event.index}/{event.total}] {event.text}"
    if event.kind == "stage_done":
        return f"      {event.text}: {duration(seconds)}, {_memory_text(event)}"
    if event.kind == "block_done":
        figures = [f"{k} {_figure_text(v)}" for k, v in event.data["figures"].items()]
        head = f"      block {event.index}/{event.total}  {duration(seconds)}"
        return "  ".join([head, *figures, *_eta_text(event), _memory_text(event)])
    if event.kind == "block" and event.text:
        return f"      block {event.index}/{event.total}  {event.text}"
    return f"      {event.text}" if event.kind == "note" else warning_line(event)


def duration(seconds: float) -> str:
    """A time span in the unit that fits: ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _eta_text(event: Event) -> list[str]:
    eta_s = event.data.get("eta_s")
    return [] if not eta_s else [f"{duration(eta_s)} left"]


def _memory_text(event: Event) -> str:
    now, peak = event.data["memory_bytes"], event.data["peak_bytes"]
    return f"memory {now / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB"


def _figure_text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
