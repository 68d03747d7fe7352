"""Finished parts of an interrupted run, kept so that the same command continues.

Layout: ``lock`` (held while a process works here), ``identity.json`` (what decided the parts) and
``parts/NAME.DIGEST.safetensors``. The digest in a file's name covers all its bytes, so one rename
commits a part, and a file that is torn or rotten is known by its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import BusyError, InterruptedRunError, PipelineError, UsageError
from pipeline.storage import DISK, Fs, atomic_write, reported

if TYPE_CHECKING:
    from torch import Tensor

Identity = Mapping[str, str | int | float | bool | list[str] | None]
"""What decides the parts, as JSON values: recipe, digests of the inputs, versions."""

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}\Z")
_OURS = {"lock", "identity.json", "parts", "traceback.txt"}


class RunDirectory:
    """Results of finished parts of one run; a context manager that holds the directory's lock.

    Args:
        path: The directory; created if missing.
        identity: Everything that decides the parts. A directory with parts of another identity is
            refused.
        fresh: Throw away the parts of an earlier run instead.
        warn: Called with a message when a damaged part is dropped.
        fs: The disk.

    Raises:
        BusyError: Another process works in the directory (on entering, as all of these).
        UsageError: The parts belong to another recipe, input or version, or the directory is not
            one of ours.
        ResourceError: The disk refuses.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        fresh: bool = False,
        warn: Callable[[str], None] = lambda message: None,
        fs: Fs = DISK,
    ) -> None:
        self.path = path.resolve()
        self.dropped = 0
        self._identity = json.loads(json.dumps(dict(identity)))
        self._fresh = fresh
        self._warn = warn
        self._fs = fs
        self._lock: int | None = None
        self._parts = self.path / "parts"

    def __enter__(self) -> Self:
        with reported(f"use the run directory {self.path}"):
            _refuse_foreign(self.path)
            self._fs.make_folder(self._parts)
            self._acquire()
        try:
            with reported(f"use the run directory {self.path}"):
                for leftover in self._parts.glob(".*.partial"):
                    self._fs.remove(leftover)
            if self._fresh:
                self.clear()
            self._check_identity()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = len(self.names())
        if isinstance(error, Exception) and not isinstance(error, PipelineError):
            _save_traceback(self.path / "traceback.txt", error, self._fs)
        self._release()
        if kept and isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError(
                "interrupted",
                why=f"{kept} finished parts are kept in {self.path}",
                fix="run the same command again to continue, or add --fresh to start over",
            ) from error
        if kept and isinstance(error, Exception):
            error.add_note(f"kept: {kept} finished parts in {self.path}")

    def names(self) -> list[str]:
        """Names of the stored parts, sorted; their content is not checked."""
        return sorted({path.name.split(".")[0] for path in self._parts.glob("*.safetensors")})

    def has(self, name: str) -> bool:
        """Whether a part is stored; whether it is sound, only `load` knows."""
        return bool(self._files(name))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """A part's tensors and its `meta`, or None if it is not there or damaged.

        A damaged part is dropped and reported, so that it is computed again.
        """
        from safetensors import safe_open

        files = self._files(name)
        with reported(f"read {self._parts}"):
            sound = [path for path in files if _digest(path) == path.name.split(".")[1]]
            if len(files) != 1 or not sound:
                self._drop(name, files)
                return None
            with safe_open(sound[0], framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["meta"])

    def store(
        self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None
    ) -> None:
        """Keep a finished part; it is on the disk when this returns.

        Args:
            name: Letters, digits, ``-`` and ``_``. An older part of this name is replaced.
            tensors: Any dtypes and shapes.
            meta: JSON values.

        Raises:
            ResourceError: The disk refuses. The older part is still there.
        """
        from safetensors.torch import save

        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        data = save(stored, {"meta": json.dumps(dict(meta or {}), sort_keys=True)})
        older = self._files(name)
        path = self._parts / f"{name}.{hashlib.sha256(data).hexdigest()}.safetensors"
        atomic_write(path, data, self._fs)
        with reported(f"write {path}"):
            for other in older:
                if other != path:
                    self._fs.remove(other)

    def clear(self) -> None:
        """Remove every part and the identity; the lock stays."""
        with reported(f"clear {self.path}"):
            self._fs.remove(self._parts)
            self._fs.remove(self.path / "identity.json")
            self._fs.make_folder(self._parts)

    def delete(self) -> None:
        """Remove the directory of a run that is finished; nothing can be stored after this."""
        with reported(f"remove {self.path}"):
            self._fs.remove(self.path)

    def _files(self, name: str) -> list[Path]:
        if not _NAME.match(name):
            raise ValueError(f"not a part's name: {name!r}")
        return sorted(self._parts.glob(f"{name}.*.safetensors"))

    def _drop(self, name: str, files: list[Path]) -> None:
        if files:
            self.dropped += 1
            self._warn(f"{self._parts}: part {name} is damaged and will be computed again")
        for path in files:
            self._fs.remove(path)

    def _acquire(self) -> None:
        path = self.path / "lock"
        self._lock = self._fs.lock(path)
        if self._lock is None:
            raise BusyError(
                f"another process works in {self.path}",
                why=f"process {path.read_text() if path.exists() else 'unknown'} holds its lock",
                fix="wait for it, end it, or choose another --run-dir",
            )

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_identity(self) -> None:
        path = self.path / "identity.json"
        differing = _differences(path, self._identity) if self.names() else []
        if differing:
            raise UsageError(
                f"the run directory {self.path} belongs to another run",
                why="; ".join(differing),
                fix="add --fresh to start over, or choose another --run-dir",
            )
        text = json.dumps(self._identity, indent=1, sort_keys=True)
        atomic_write(path, text.encode(), self._fs)


def _refuse_foreign(path: Path) -> None:
    if not path.is_dir():
        return
    for entry in sorted(path.iterdir()):
        if entry.name.removeprefix(".").removesuffix(".partial") not in _OURS:
            raise UsageError(
                f"{path} is not a run directory",
                why=f"it holds {entry.name}",
                fix="choose another --run-dir",
            )


def _differences(path: Path, identity: dict[str, Any]) -> list[str]:
    """What the identity stored at `path` and the present one disagree on, one text a field."""
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        return [f"its {path.name} is missing or damaged"]
    return [
        f"{key}: {stored.get(key)!r} there, {identity.get(key)!r} now"
        for key in sorted(stored.keys() | identity.keys())
        if stored.get(key) != identity.get(key)
    ]


def _save_traceback(path: Path, error: Exception, fs: Fs) -> None:
    text = "".join(traceback.format_exception(error))
    with suppress(PipelineError):
        atomic_write(path, text.encode(errors="replace"), fs)
        error.add_note(f"traceback: {path}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
