"""A child process that runs one llama.cpp request, and what its death means.

llama.cpp answers a bad file or a failed check with `abort()` or a signal, and never gives up by
itself, so it may not run inside the pipeline's process.

Wire format, both ways: one line of JSON, then as many raw bytes as that message is known to have.
The child lives as long as its stdin is open: it cannot outlive a parent that crashed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import pipeline.errors
from pipeline.errors import PipelineError, ResourceError, UsageError, VerificationError

Header = dict[str, Any]

LOG_LINES = 12
"""Last lines of llama.cpp's log that an error message quotes."""

EXHAUSTED = (
    "bad_alloc",
    "failed to allocate",
    "unable to allocate",
    "insufficient memory",
    "Resource temporarily unavailable",  # no room for a thread's stack
    "iostream error",  # a write to a full disk
)
"""How llama.cpp, C++ and OpenMP word the end of memory or disk space."""


def write_message(stream: BinaryIO, header: Mapping[str, Any], payload: bytes | memoryview) -> None:
    """Sends one message; `payload` may be empty."""
    stream.write(json.dumps(header).encode() + b"\n")
    stream.write(payload)
    stream.flush()


def describe(error: PipelineError) -> Header:
    """The message that carries an error to the parent."""
    kind = type(error).__name__
    return {"error": kind, "what": error.what, "why": error.why, "fix": error.fix}


class WorkerProcess:
    """One request in a child of its own.

    Args:
        operation: Name of the operation of `runtimes.llamacpp_worker`.
        arguments: Its arguments, representable in JSON.
        payload: Raw bytes that follow them.
        subject: What messages call the file at work.
        time_limit: Seconds that the child may stay silent while it is being waited for.

    Raises:
        ResourceError: The child could not be started.
    """

    def __init__(
        self,
        operation: str,
        arguments: Mapping[str, Any],
        payload: bytes | memoryview = b"",
        *,
        subject: str,
        time_limit: float,
    ) -> None:
        self._operation = operation
        self._subject = subject
        self._time_limit = min(time_limit, threading.TIMEOUT_MAX)
        self._timed_out = False
        self._closed = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = self._start()
        self._stdin = cast(io.BufferedWriter, self._process.stdin)
        self._stdout = cast(io.BufferedReader, self._process.stdout)
        request = {"operation": operation, "arguments": dict(arguments), "bytes": len(payload)}
        with self._answer_expected(), contextlib.suppress(BrokenPipeError):
            write_message(self._stdin, request, payload)

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                # -P: a file numpy.py in the user's directory must not become ours.
                [sys.executable, "-P", "-m", "runtimes.llamacpp_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=child_environment(),
            )
        except OSError as error:
            self._log.close()
            raise ResourceError(
                "cannot start llama.cpp", why=str(error), fix="free memory, or stop other programs"
            ) from error

    def receive(self) -> Header:
        """The next message.

        Raises:
            PipelineError: The one that the child met, or what its death means.
        """
        with self._answer_expected():
            line = self._stdout.readline()
        if not line.endswith(b"\n"):
            self._fail()
        message: Header = json.loads(line)
        if "error" in message:
            self._reraise(message)
        return message

    def receive_into(self, buffer: memoryview) -> None:
        """Fills `buffer` with raw bytes that follow a message.

        Raises:
            PipelineError: The child died, or fell silent.
        """
        filled = 0
        while filled < len(buffer):
            with self._answer_expected():
                count = self._stdout.readinto(buffer[filled:])
            if not count:
                self._fail()
            filled += count

    def close(self) -> None:
        """Ends the child, whatever it is doing, and removes its log."""
        if self._closed:
            return
        self._closed = True
        self._process.kill()
        self._process.wait()
        for stream in (self._stdin, self._stdout, self._log):
            with contextlib.suppress(OSError):  # what a dead child left unread
                stream.close()

    @contextlib.contextmanager
    def _answer_expected(self) -> Iterator[None]:
        """Kills the child if the body takes longer than the time limit."""
        self._check_open()
        timer = threading.Timer(self._time_limit, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"llama.cpp on {self._subject} was closed while it was in use")

    def _expire(self) -> None:
        self._timed_out = True
        self._process.kill()

    def _reraise(self, message: Header) -> NoReturn:
        kind = getattr(pipeline.errors, message["error"])
        log = self._log_tail()
        why, fix = message["why"] or log, message["fix"]
        if _exhausted(log):
            kind, fix = ResourceError, "free memory or disk space"
        raise kind(message["what"], why=why, fix=fix)

    def _fail(self) -> NoReturn:
        """Raises what the end of the child's output means."""
        self._check_open()
        if not self._timed_out:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self._time_limit)
        what = f"llama.cpp on {self._subject} ({self._operation})"
        if self._timed_out:
            raise ResourceError(
                f"{what} gave no answer within {self._time_limit:g} s",
                why=self._log_tail() or "the model or the window is too large for this machine",
                fix="raise the time limit, or use fewer tokens in a window",
            )
        status = self._process.returncode
        log = self._log_tail()
        if status == -signal.SIGKILL or _exhausted(log):
            raise ResourceError(
                f"{what} ran out of memory or disk space",
                why=log or "the process was killed from outside, as Linux does when memory is full",
                fix="close other programs, or use shorter windows or a smaller model",
            )
        ending = f"crashed with {_signal_name(-status)}" if status and status < 0 else "stopped"
        raise VerificationError(
            f"{what} {ending}",
            why=log or f"exit status {status}, nothing logged",
            fix="the file breaks an assumption of llama.cpp: check its metadata and tensor shapes",
        )

    def _log_tail(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2**14))
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join([line.rstrip() for line in lines if line.strip(" .")][-LOG_LINES:])


def child_environment() -> dict[str, str]:
    """The caller's environment, and where to find this package if it is not installed."""
    environment = {
        # Threads that spin while they wait are many times slower when other programs run too.
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        # A failed assertion of ggml would otherwise start a debugger to print a backtrace.
        "GGML_NO_BACKTRACE": "1",
    }
    root = str(Path(__file__).resolve().parents[1])
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    # PYTHONPATH goes before the standard library, where other packages' modules must not be.
    if root not in map(os.path.realpath, [*known, *installed]):
        environment["PYTHONPATH"] = os.pathsep.join([*known, root])
    return environment


def _exhausted(log: str) -> bool:
    return any(words in log for words in EXHAUSTED)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
