"""What the child process of llama.cpp finds in its environment."""

import os
import site
from pathlib import Path

import pytest

from runtimes import llamacpp_process


def python_path(monkeypatch: pytest.MonkeyPatch, root: Path, callers: str | None) -> str | None:
    """PYTHONPATH of a child, for a package in `root` and this PYTHONPATH of the caller."""
    monkeypatch.setattr(
        llamacpp_process, "__file__", str(root / "runtimes" / "llamacpp_process.py")
    )
    if callers is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", callers)
    return llamacpp_process.child_environment().get("PYTHONPATH")


def test_a_checkout_comes_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert python_path(monkeypatch, tmp_path, None) == str(tmp_path)
    assert python_path(monkeypatch, tmp_path, "/a") == os.pathsep.join(["/a", str(tmp_path)])
    known = os.pathsep.join([str(tmp_path), "/a"])
    assert python_path(monkeypatch, tmp_path, known) == known


@pytest.mark.parametrize("callers", [None, "/a"])
def test_installed_packages_stay_behind_the_standard_library(
    monkeypatch: pytest.MonkeyPatch, callers: str | None
) -> None:
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        assert python_path(monkeypatch, Path(folder).resolve(), callers) == callers
