"""Crash-safe files: a path holds the old content or the new one, never a part of either.

Assumes what POSIX promises: a rename within one file system is atomic, and what was synced survives
a crash. Every change of the disk goes through an `Fs`, so that tests can make any of them fail.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import ResourceError, UsageError

OUTPUT_MARKER = "manifest.json"
"""The file that tells a folder of ours, which may be overwritten, from anybody else's."""

_ADVICE = {
    errno.ENOSPC: "free disk space, or choose a folder on another disk",
    errno.EDQUOT: "free part of the quota, or choose a folder on another disk",
    errno.EFBIG: "raise the file size limit (ulimit -f), or choose another disk",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EIO: "check the disk; the system log names the device",
    errno.ENOLCK: "choose a folder on a local disk; this file system cannot lock files",
}


class Fs:
    """The changes that this project makes to a disk, one method each. Raises `OSError` only."""

    def write(self, path: Path, data: bytes | Callable[[Path], None]) -> None:
        """Create or truncate `path` and fill it, with bytes or by calling `data` with the path."""
        if callable(data):
            data(path)
        else:
            path.write_bytes(data)

    def sync(self, path: Path) -> None:
        """Wait until the content of a file, or the entries of a folder, are on the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot sync a folder; nothing better is to be had there.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Move within one file system; replaces a file or an empty folder at `target`."""
        source.replace(target)

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents; one that exists is left as it is."""
        path.mkdir(parents=True, exist_ok=True)

    def remove(self, path: Path) -> None:
        """Remove a file or a whole folder; one that is missing is left missing."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def lock(self, path: Path) -> int | None:
        """Open `path` and lock it for this process; the descriptor, or None if it is taken.

        The lock goes with the process, however that ends. The file then holds the process id.
        """
        import fcntl

        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between the two calls above.
            if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                raise BlockingIOError
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError | FileNotFoundError):
                return None
            raise
        return descriptor


DISK = Fs()


@contextmanager
def reported(action: str) -> Iterator[None]:
    """Turn an `OSError` inside into the error that a user can act on.

    Args:
        action: What is being done, to be read after "cannot".

    Raises:
        ResourceError: No space, no permission, a read-only or failing disk.
        UsageError: Any other refusal: the path itself is not usable.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        advice = _ADVICE.get(error.errno or 0)
        if advice is None:
            raise UsageError(f"cannot {action}", why=why, fix="choose another path") from error
        raise ResourceError(f"cannot {action}", why=why, fix=advice) from error


def atomic_write(path: Path, data: bytes | Callable[[Path], None], fs: Fs = DISK) -> None:
    """Give `path` new content in one step, and wait until it is on the disk.

    Args:
        path: Destination; one writer at a time.
        data: The content, or a function that writes it to the path it is given.
        fs: The disk.

    Raises:
        ResourceError: No space or no permission. `path` keeps its old content.
        UsageError: The path is not usable.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with reported(f"write {path}"):
        try:
            fs.write(temporary, data)
            fs.sync(temporary)
            fs.rename(temporary, path)
            fs.sync(path.parent)
        except BaseException:
            with suppress(OSError):
                fs.remove(temporary)
            raise


def check_free_space(folder: Path, needed_bytes: int) -> None:
    """Refuse work whose result cannot fit.

    Args:
        folder: Where the bytes will go; need not exist yet.
        needed_bytes: Bytes that will be written.

    Raises:
        ResourceError: Fewer bytes are free.
    """
    existing = _nearest_existing(folder.absolute())
    with reported(f"use {folder}"):
        free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ResourceError(
            f"{folder}: {needed_bytes / 1e9:.2f} GB are needed",
            why=f"{free_bytes / 1e9:.2f} GB are free on the disk of {existing}",
            fix=_ADVICE[errno.ENOSPC],
        )


def _nearest_existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_output(final: Path, *, overwrite: bool, fs: Fs = DISK) -> None:
    """Find out before any work whether `publish` will be able to deliver to `final`.

    Brings back the old content if an earlier overwrite was killed halfway.

    Raises:
        UsageError: `final` is a file, or holds something that must not be replaced.
        ResourceError: The folder's place cannot be written to.
    """
    final = final.resolve()
    with reported(f"write to {final}"):
        _finish_swap(final, fs)
        _refuse_content(final, overwrite)
        probe = final.with_name(f".{final.name}.probe-{os.getpid()}")
        try:
            fs.make_folder(probe)
            fs.remove(probe)
        finally:
            with suppress(OSError):
                probe.rmdir()


@contextmanager
def publish(final: Path, *, overwrite: bool, fs: Fs = DISK) -> Iterator[Path]:
    """A folder to fill, which appears at `final` when the block ends without an exception.

    Until then nothing of it is at `final`, and what was there stays; after an exception nothing
    remains. One process at a time may publish to one place.

    Yields:
        An empty folder beside `final`.

    Raises:
        UsageError: `final` is a file, or holds something that must not be replaced.
        ResourceError: The disk refuses.
    """
    check_output(final, overwrite=overwrite, fs=fs)
    final = final.resolve()
    staging = _staging(final)
    try:
        with reported(f"write to {final}"):
            fs.remove(staging)
            fs.make_folder(staging)
        yield staging
        with reported(f"write to {final}"):
            for path in (*sorted(staging.rglob("*")), staging):
                fs.sync(path)
            _swap(staging, final, fs)
    except BaseException:
        with suppress(OSError):
            fs.remove(staging)
        raise


def _staging(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _refuse_content(final: Path, overwrite: bool) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise UsageError(f"the output {final} is a file", fix="give a folder: --output DIR")
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"the output folder {final} exists and is not empty",
            fix="choose another --output, or add --overwrite to replace it",
        )
    if not (final / OUTPUT_MARKER).is_file():
        raise UsageError(
            f"refusing to overwrite {final}",
            why=f"it holds no {OUTPUT_MARKER}, so this program did not write it",
            fix="choose another --output, or remove the folder yourself",
        )


def _swap(staging: Path, final: Path, fs: Fs) -> None:
    """Move `staging` to `final`; on failure the old content is back at `final`."""
    old = _replaced(final)
    had_content = final.is_dir() and any(final.iterdir())
    if had_content:
        fs.rename(final, old)
    try:
        fs.rename(staging, final)
    except BaseException:
        if had_content:
            with suppress(OSError):
                fs.rename(old, final)
        raise
    fs.sync(final.parent)
    with suppress(OSError):
        fs.remove(old)


def _finish_swap(final: Path, fs: Fs) -> None:
    """Complete or undo a swap that a kill cut short between its two renames."""
    old = _replaced(final)
    if not old.exists():
        return
    if final.exists():
        fs.remove(old)
    else:
        fs.rename(old, final)


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A folder for large temporary files on the disk of `beside`, removed afterwards.

    Raises:
        ResourceError: The disk refuses.
    """
    with reported(f"write beside {beside}"):
        scratch = Path(tempfile.mkdtemp(prefix=".piso-scratch-", dir=beside.resolve().parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
