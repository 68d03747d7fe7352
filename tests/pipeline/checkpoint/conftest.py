"""A small checkpoint to copy and break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny import make_checkpoint


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama of one block, never to be changed."""
    return make_checkpoint(tmp_path_factory.mktemp("template") / "model", num_hidden_layers=1)


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(template, tmp_path / "model"))
