"""Everything that can go wrong with llama.cpp ends in a readable error and no child process."""

from __future__ import annotations

import importlib.util
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from demo_file import write_gguf

from pipeline.errors import (
    InputError,
    PipelineError,
    ResourceError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from runtimes import llamacpp
from runtimes.llamacpp import LlamaCpp

pytest.importorskip("llama_cpp")

TOKENS = torch.arange(16 * 256).view(16, 256)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's memory limits")


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does: afterwards there is no child and no temporary file."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = set(children())
    yield
    assert set(children()) <= before
    assert list(temporary.iterdir()) == []


def failure(runtime: LlamaCpp, tokens: torch.Tensor = TOKENS) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        list(runtime.logits(tokens, 128))
    return caught.value


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.gguf", tmp_path):
        with pytest.raises(InputError, match="is not a file"):
            LlamaCpp(path)


def test_truncated_file(truncated_gguf: Path) -> None:
    error = failure(LlamaCpp(truncated_gguf))
    assert isinstance(error, VerificationError)
    assert "refuses to load truncated.gguf" in error.what
    assert "not within the file bounds" in error.why
    with pytest.raises(VerificationError, match="refuses to load"):
        LlamaCpp(truncated_gguf).tokenize("text")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello world" * 100])
def test_not_a_gguf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    error = failure(LlamaCpp(path))
    assert isinstance(error, VerificationError)
    assert "gguf" in error.why


def test_nan_weights(demo_gguf: Path, tmp_path: Path) -> None:
    content = bytearray(demo_gguf.read_bytes())
    content[-64:] = np.full(16, np.nan, np.float32).tobytes()
    path = tmp_path / "nan.gguf"
    path.write_bytes(content)
    error = failure(LlamaCpp(path))
    assert isinstance(error, VerificationError)
    assert "found nan value" in error.why


def test_failed_assertion_of_llamacpp(tmp_path: Path) -> None:
    path = tmp_path / "experts.gguf"
    write_gguf(path, tokenizer=False, expert_count=3)
    error = failure(LlamaCpp(path))
    assert isinstance(error, VerificationError)
    assert "experts.gguf (logits) crashed with SIGABRT" in error.what
    assert "GGML_ASSERT" in error.why


@pytest.mark.parametrize("first", [0, 200])
def test_token_outside_the_vocabulary(demo_gguf: Path, first: int) -> None:
    tokens = TOKENS.clone()
    tokens[3, 5] = 4096
    with pytest.raises(InputError, match=r"token id 4096 is outside the vocabulary of demo\.gguf"):
        list(LlamaCpp(demo_gguf).logits(tokens, first))


def test_bad_windows_are_refused_at_once(demo_gguf: Path) -> None:
    with pytest.raises(InputError, match="negative token id"):
        LlamaCpp(demo_gguf).logits(-TOKENS, 0)
    with pytest.raises(InputError, match="nothing to score"):
        LlamaCpp(demo_gguf).logits(TOKENS, 255)


def test_time_limit(demo_gguf: Path) -> None:
    started = time.monotonic()
    error = failure(LlamaCpp(demo_gguf, time_limit=0.02))
    assert isinstance(error, ResourceError)
    assert "gave no answer within 0.02 s" in error.what
    assert time.monotonic() - started < 10


def test_no_time_limit(demo_gguf: Path) -> None:
    assert LlamaCpp(demo_gguf, time_limit=math.inf).tokenize("text")[0] == 0


def test_time_limit_does_not_count_the_consumer(demo_gguf: Path) -> None:
    runtime = LlamaCpp(demo_gguf, time_limit=5)
    stream = runtime.logits(TOKENS[:10], 128)
    next(stream)
    worker = next(iter(runtime._workers))
    worker._time_limit = 0.5  # the rest of the first batch is ready
    time.sleep(1)
    assert next(stream).shape == (127, 4096)
    runtime.close()


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (signal.SIGKILL, ResourceError, "ran out of memory"),
        (signal.SIGSEGV, VerificationError, "crashed with SIGSEGV"),
    ],
)
def test_killed_in_the_middle(
    demo_gguf: Path, number: signal.Signals, kind: type[PipelineError], words: str
) -> None:
    before = set(children())
    stream = LlamaCpp(demo_gguf).logits(TOKENS, 128)
    next(stream)
    (child,) = set(children()) - before
    child.send_signal(number)
    with pytest.raises(kind, match=words):
        list(stream)


@linux_only
def test_window_longer_than_memory(demo_gguf: Path) -> None:
    tokens = torch.zeros(1, 300_000, dtype=torch.int64)
    with pytest.raises(ResourceError, match="no room for 300000 tokens") as caught:
        next(LlamaCpp(demo_gguf, memory_limit=2**28).logits(tokens, 299_990))
    assert "failed to allocate" in caught.value.why


@linux_only
def test_logits_larger_than_memory(demo_gguf: Path) -> None:
    tokens = torch.zeros(4, 512, dtype=torch.int64)
    assert len(list(LlamaCpp(demo_gguf, memory_limit=2**27).logits(tokens, 0))) == 4
    for limit in (2**20, 3 * 2**23, 3 * 2**24):
        with pytest.raises(ResourceError):
            list(LlamaCpp(demo_gguf, memory_limit=limit).logits(tokens, 0))


def test_abandoned_run_leaves_nothing(demo_gguf: Path) -> None:
    stream = LlamaCpp(demo_gguf).logits(TOKENS, 128)
    next(stream)
    del stream  # the fixture looks for the child


def test_closing_ends_a_run(demo_gguf: Path) -> None:
    with LlamaCpp(demo_gguf) as runtime:
        stream = runtime.logits(TOKENS, 128)
        next(stream)
    with pytest.raises(UsageError, match="was closed while it was in use"):
        next(stream)
    runtime.close()


def test_two_runs_side_by_side(demo_gguf: Path) -> None:
    runtime = LlamaCpp(demo_gguf)
    pairs = zip(runtime.logits(TOKENS, 128), runtime.logits(TOKENS, 128), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


ORPHANING_PARENT = """
import sys, torch
from runtimes.llamacpp import LlamaCpp
next(LlamaCpp(sys.argv[1]).logits(torch.zeros(1, 16384, dtype=torch.int64), 16000))
"""


def test_child_does_not_outlive_a_killed_parent(demo_gguf: Path) -> None:
    """Not even in the middle of a window that takes a minute."""
    root = Path(llamacpp.__file__).parents[1]
    arguments = [sys.executable, "-c", ORPHANING_PARENT, str(demo_gguf)]
    with subprocess.Popen(arguments, cwd=root) as parent:
        handle = psutil.Process(parent.pid)
        while not (found := handle.children()) or found[0].cpu_times().user < 1:
            assert parent.poll() is None
            time.sleep(0.1)
        parent.kill()
    _, alive = psutil.wait_procs(found, timeout=5)
    for child in alive:
        child.kill()
    assert not alive


def test_hostile_working_directory(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    assert LlamaCpp(demo_gguf).tokenize("text")[0] == 0


def test_not_installed(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find_spec(name)
    )
    assert not llamacpp.available()
    for use in (llamacpp.version, lambda: LlamaCpp(demo_gguf)):
        with pytest.raises(UnsupportedError, match="llama-cpp-python is not installed"):
            use()


def test_broken_library(demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match="cannot be loaded"):
        LlamaCpp(demo_gguf).tokenize("text")


def test_bug_in_the_child_is_shown(demo_gguf: Path) -> None:
    with (
        LlamaCpp(demo_gguf)._worker("no such operation", {}) as worker,
        pytest.raises(VerificationError, match=r"stopped[\s\S]*KeyError: 'no such operation'"),
    ):
        worker.receive()
