"""The event stream and its three faces."""

from __future__ import annotations

import io
import json
import math
import re
from contextlib import suppress
from typing import Any

import pytest

from pipeline import progress as module
from pipeline.errors import UsageError
from pipeline.progress import MODES, Progress, duration, memory_bytes, open_progress


class Clock:
    """Stands still unless told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    monkeypatch.setattr(module, "memory_bytes", lambda: (1_500_000_000, 2_000_000_000))
    return clock


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def play(progress: Progress, clock: Clock) -> None:
    """Two stages; the second has three blocks of 0 (resumed), 10 and 20 seconds."""
    with progress:
        progress.stage("load", 1, 2)
        progress.note("4.2 M weights [bold]")
        clock.now += 3
        progress.stage("quantize", 2, 2)
        progress.block(1, 3, resumed=True)
        clock.now += 1
        progress.block(2, 3)
        progress.figure("qkv", 0.0123456)
        progress.figure("o", math.nan)
        clock.now += 10
        progress.block(3, 3)
        clock.now += 20
        progress.warning("replaced Q4_0 by Q8_0")
        progress.summary({"exit_code": 0})


def events(clock: Clock) -> list[dict[str, Any]]:
    stream = io.StringIO()
    play(open_progress("json", stream), clock)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_lines_tell_everything(clock: Clock) -> None:
    told = events(clock)
    assert [event["event"] for event in told] == [
        "stage", "note", "stage_done",
        "stage", "block", "block", "block_done", "block", "warning", "block_done", "stage_done",
        "summary",
    ]  # fmt: skip
    assert all(event["peak_bytes"] == 2_000_000_000 for event in told[:-1])
    assert told[-1]["exit_code"] == 0
    first, second = (event for event in told if event["event"] == "block_done")
    assert first["figures"] == {"qkv": 0.0123456, "o": None}
    assert second["figures"] == {}


def test_time_left_comes_from_measured_blocks_only(clock: Clock) -> None:
    told = events(clock)
    blocks = [event for event in told if event["event"] == "block"]
    assert [event["eta_s"] for event in blocks] == [None, None, 10.0]
    done = [event for event in told if event["event"] == "block_done"]
    assert [(event["seconds"], event["eta_s"]) for event in done] == [(10.0, 10.0), (20.0, 0.0)]


def test_time_left_is_the_mean_times_the_rest(clock: Clock) -> None:
    stream = io.StringIO()
    with open_progress("json", stream) as progress:
        progress.stage("quantize", 1, 1)
        for i, seconds in ((1, 4.0), (2, 8.0)):
            progress.block(i, 10)
            clock.now += seconds
        progress.block(3, 10)
    last = json.loads(stream.getvalue().splitlines()[-3])
    assert (last["event"], last["eta_s"]) == ("block", 8 * 6.0)


def test_time_left_of_a_phase_knows_nothing_of_the_phase_before(clock: Clock) -> None:
    stream = io.StringIO()
    with open_progress("json", stream) as progress:
        progress.stage("allocate", 1, 1)
        progress.block(1, 1)
        clock.now += 100
        progress.phase("exchanges")
        progress.block(1, 3)
        clock.now += 2
        progress.block(2, 3)
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    blocks = [event for event in told if event["event"] == "block"]
    assert [event["eta_s"] for event in blocks] == [None, None, 2 * 2.0]
    assert [e["text"] for e in told if e["event"] == "note"] == ["exchanges"]
    assert progress.timings == {"allocate": 102.0}


def test_timings_and_warnings_are_kept(clock: Clock) -> None:
    progress = open_progress("quiet", io.StringIO())
    play(progress, clock)
    assert progress.timings == {"load": 3.0, "quantize": 31.0}
    assert progress.warnings == ["replaced Q4_0 by Q8_0"]


def test_plain_lines(clock: Clock) -> None:
    stream = io.StringIO()
    play(open_progress("plain", stream), clock)
    assert stream.getvalue().splitlines() == [
        "[1/2] load",
        "      4.2 M weights [bold]",
        "      load: 3.0 s, memory 1.50 GB, peak 2.00 GB",
        "[2/2] quantize",
        "      block 1/3  resumed",
        "      block 2/3  10.0 s  qkv 0.01235  o nan  10.0 s left  memory 1.50 GB, peak 2.00 GB",
        "warning: replaced Q4_0 by Q8_0",
        "      block 3/3  20.0 s  memory 1.50 GB, peak 2.00 GB",
        "      quantize: 31.0 s, memory 1.50 GB, peak 2.00 GB",
    ]


def test_quiet_keeps_warnings(clock: Clock) -> None:
    stream = io.StringIO()
    play(open_progress("quiet", stream), clock)
    assert stream.getvalue() == "warning: replaced Q4_0 by Q8_0\n"


def test_auto_is_live_on_a_terminal_and_plain_elsewhere(clock: Clock) -> None:
    plain, auto = io.StringIO(), io.StringIO()
    play(open_progress("plain", plain), clock)
    play(open_progress("auto", auto), clock)
    assert auto.getvalue() == plain.getvalue()

    terminal = Terminal()
    play(open_progress("auto", terminal), clock)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    for text in ("[2/2] quantize", "block 3/3", "qkv 0.01235", "replaced Q4_0", "weights [bold]"):
        assert text in shown
    assert terminal.getvalue().rstrip().endswith("\x1b[2K")  # the live line is gone


def test_failed_stage_has_no_end(clock: Clock) -> None:
    stream = io.StringIO()
    with suppress(KeyError), open_progress("json", stream) as progress:
        progress.stage("load", 1, 2)
        progress.block(1, 2)
        raise KeyError
    assert "done" not in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (99.9, "99.9 s"), (99.99, "1 min 40 s"), (3599.6, "1 h 00 min"),
     (7800, "2 h 10 min"), (119.7, "2 min 00 s")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_memory_is_measured() -> None:
    ballast = bytearray(64 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    now, peak = memory_bytes()
    assert len(ballast) < now <= peak < 1 << 40


def test_unknown_mode() -> None:
    with pytest.raises(UsageError, match="did you mean json"):
        open_progress("jsn")
    assert "auto" in MODES
