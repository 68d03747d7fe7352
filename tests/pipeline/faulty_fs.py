"""A disk whose k-th change fails."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.storage import Fs

OPERATIONS = ("write", "sync", "rename", "make_folder", "remove", "lock")


class FaultyFs(Fs):
    """Counts changes of the disk, and fails one of them with "no space left".

    Args:
        fail_at: Number of the change that fails, from 1; 0 for none.
        torn: A failing write leaves half of its bytes behind.
        dead: Every later change fails too, as after a kill: nothing is cleaned up.
        error: What is raised.
    """

    def __init__(
        self,
        fail_at: int = 0,
        *,
        torn: bool = False,
        dead: bool = False,
        error: Callable[[], BaseException] = lambda: OSError(errno.ENOSPC, "No space left"),
    ) -> None:
        self.count = 0
        self.log: list[str] = []
        for name in OPERATIONS:
            setattr(self, name, self._faulty(name, getattr(super(), name)))
        self._fail_at, self._torn, self._dead, self._error = fail_at, torn, dead, error

    def _faulty(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Path, *rest: Any) -> Any:
            self.count += 1
            self.log.append(f"{name} {path.name}")
            if self.count == self._fail_at or (self._dead and self.count > self._fail_at > 0):
                if self._torn and name == "write" and isinstance(rest[0], bytes):
                    real(path, rest[0][: len(rest[0]) // 2])
                raise self._error()
            return real(path, *rest)

        return operation


class Killed(BaseException):
    """Stands for the end of the process."""
