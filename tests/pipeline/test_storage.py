"""Files and folders hold the old content or the new, whichever change of the disk fails."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, ResourceError, UsageError
from pipeline.storage import Fs, atomic_write, check_free_space, check_output, publish, reported

from .faulty_fs import FaultyFs, Killed


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fill(staging: Path, text: bytes) -> None:
    (staging / "manifest.json").write_bytes(text)
    (staging / "sub").mkdir()
    (staging / "sub" / "model.gguf").write_bytes(text * 3)


def output(text: bytes) -> dict[str, bytes]:
    return {"manifest.json": text, "sub/model.gguf": text * 3}


def test_atomic_write_syncs_before_and_after_the_rename(tmp_path: Path) -> None:
    fs = FaultyFs()
    atomic_write(tmp_path / "f", b"new", fs)
    assert content(tmp_path) == {"f": b"new"}
    steps = ["write .f.partial", "sync .f.partial", "rename .f.partial", f"sync {tmp_path.name}"]
    assert fs.log == steps


def test_atomic_write_takes_a_function_that_writes(tmp_path: Path) -> None:
    atomic_write(tmp_path / "f", lambda path: path.write_text("by function") and None)
    assert content(tmp_path) == {"f": b"by function"}


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_failed_atomic_write_leaves_old_or_new_and_no_rest(
    tmp_path: Path, k: int, torn: bool
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(ResourceError, match="free disk space"):
        atomic_write(tmp_path / "f", b"new", FaultyFs(k, torn=torn))
    assert content(tmp_path) == {"f": b"old" if k < 4 else b"new"}


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_killed_atomic_write_leaves_old_or_new(tmp_path: Path, k: int) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(Killed):
        atomic_write(tmp_path / "f", b"new", FaultyFs(k, torn=True, dead=True, error=Killed))
    assert (tmp_path / "f").read_bytes() == (b"old" if k < 4 else b"new")
    atomic_write(tmp_path / "f", b"newer")
    assert content(tmp_path) == {"f": b"newer"}


def test_file_size_limit_of_the_system_is_a_resource_error(tmp_path: Path) -> None:
    """A real EFBIG from the kernel, in a process of its own."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from pipeline.errors import ResourceError; from pipeline.storage import atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: atomic_write(Path(sys.argv[1]), b'x' * 5000)\n"
        "except ResourceError as error: sys.exit(error.exit_code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "f"], check=False)
    assert done.returncode == 12
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EACCES, ResourceError),
        (errno.EROFS, ResourceError),
        (errno.EIO, ResourceError),
        (errno.ENOTDIR, UsageError),
        (errno.ENAMETOOLONG, UsageError),
    ],
)
def test_every_refusal_of_the_system_is_explained(number: int, kind: type[PipelineError]) -> None:
    with pytest.raises(kind) as caught, reported("write x"):
        raise OSError(number, os.strerror(number))
    assert caught.value.what == "cannot write x"
    assert caught.value.why == os.strerror(number)
    assert caught.value.fix


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ResourceError, match="GB are free"):
        check_free_space(tmp_path / "not" / "yet", 1 << 60)
    assert content(tmp_path) == {}


def test_publish_appears_only_when_complete(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with publish(final, overwrite=False) as staging:
        fill(staging, b"new")
        assert not final.exists()
        assert staging.parent == final.parent
    assert content(final) == output(b"new")
    assert os.listdir(final.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_publish_leaves_nothing_after_an_exception(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with suppress(error), publish(tmp_path / "out", overwrite=False) as staging:
        fill(staging, b"new")
        raise error
    assert os.listdir(tmp_path) == []


def test_publish_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with publish(tmp_path / "out", overwrite=False) as staging:
        fill(staging, b"new")
    assert content(tmp_path / "out") == output(b"new")


def test_existing_output_is_refused_unless_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for text, overwrite in ((b"old", False), (b"new", True)):
        with publish(final, overwrite=overwrite) as staging:
            fill(staging, text)
    with pytest.raises(UsageError, match="--overwrite"):
        check_output(final, overwrite=False)
    assert content(tmp_path) == {f"out/{k}": v for k, v in output(b"new").items()}


def test_folders_and_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"manifest\.json"):
        check_output(tmp_path / "out", overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="cannot write"):
        check_output(tmp_path / "file" / "out", overwrite=True)
    assert sorted(content(tmp_path)) == ["file", "out/thesis.tex"]


def test_unwritable_place_is_found_before_any_work(tmp_path: Path) -> None:
    fs = FaultyFs(2, error=lambda: OSError(errno.EROFS, "Read-only file system"))
    with pytest.raises(ResourceError, match="writable"):
        check_output(tmp_path / "out", overwrite=False, fs=fs)
    assert os.listdir(tmp_path) == []


def test_publish_syncs_everything_before_and_the_parent_after_the_rename(tmp_path: Path) -> None:
    fs = FaultyFs()
    publish_once(tmp_path / "out", b"new", fs)
    rename = fs.log.index("rename .out.partial")
    before, after = fs.log[:rename], fs.log[rename:]
    for name in ("manifest.json", "model.gguf", "sub", ".out.partial"):
        assert f"sync {name}" in before
    assert f"sync {tmp_path.name}" in after


def test_a_lock_file_that_its_holder_just_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def removed_meanwhile(descriptor: int, operation: int) -> None:
        (tmp_path / "lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_meanwhile)
    assert Fs().lock(tmp_path / "lock") is None
    monkeypatch.undo()
    descriptor = Fs().lock(tmp_path / "lock")
    assert descriptor is not None
    assert (tmp_path / "lock").read_text() == str(os.getpid())
    assert Fs().lock(tmp_path / "lock") is None
    os.close(descriptor)


def publish_once(final: Path, text: bytes, fs: Fs) -> None:
    with publish(final, overwrite=True, fs=fs) as staging:
        fill(staging, text)


def count_of_changes(tmp_path: Path, *, existing: bool) -> int:
    final = tmp_path / "counted" / "out"
    if existing:
        publish_once(final, b"old", Fs())
    fs = FaultyFs()
    publish_once(final, b"new", fs)
    return fs.count


@pytest.mark.parametrize("existing", [False, True])
def test_any_failing_change_leaves_the_old_output_or_the_new(
    tmp_path: Path, existing: bool
) -> None:
    changes = count_of_changes(tmp_path, existing=existing)
    assert changes >= 10
    before = output(b"old") if existing else {}
    for k in range(1, changes + 1):
        final = tmp_path / str(k) / "out"
        if existing:
            publish_once(final, b"old", Fs())
        try:
            publish_once(final, b"new", FaultyFs(k))
        except ResourceError:
            assert content(final) in (before, output(b"new")), k
        publish_once(final, b"newer", Fs())
        assert content(final) == output(b"newer"), k
        assert os.listdir(final.parent) == ["out"], k


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_at_any_change_leaves_nothing_half(tmp_path: Path, existing: bool) -> None:
    changes = count_of_changes(tmp_path, existing=existing)
    for k in range(1, changes + 1):
        final = tmp_path / str(k) / "out"
        if existing:
            publish_once(final, b"old", Fs())
        with pytest.raises(Killed):
            publish_once(final, b"new", FaultyFs(k, dead=True, error=Killed))
        valid = [{}, output(b"new"), *([output(b"old")] if existing else [])]
        assert content(final) in valid, k
        check_output(final, overwrite=True)
        assert content(final) in valid[0 if not existing else 1 :], k  # the old one is back
        publish_once(final, b"new", Fs())  # and clears what was left
        assert os.listdir(final.parent) == ["out"], k
