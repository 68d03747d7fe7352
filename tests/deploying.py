"""Runs `deploy` in this process or as a user would, on small models and little text."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import run
from pipeline.demo import corpus
from pipeline.progress import open_progress
from pipeline.recipe_files import load_recipe
from pipeline.report import Report

ROOT = Path(__file__).parents[1]

SMALL: dict[str, Any] = {
    "token_embedding_type": "Q8_0",
    "calibration.source": "stdlib",
    "calibration.samples": 16,
    "calibration.seqlen": 128,
    "evaluation.context": 256,
    "evaluation.chunks": 40,
    "tuning.steps": 0,
}
"""Seconds instead of minutes; enough evaluation text that rounding noise averages out."""


@cache
def short_text() -> str:
    """Path of a text that is enough for `SMALL` with few chunks, and quickly tokenized."""
    folder = Path(tempfile.mkdtemp(prefix="short-text-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "text.txt").write_text(corpus("calibration", 60_000), encoding="utf-8")
    return str(folder / "text.txt")


def deploy(model: Path | None, output: Path, options: dict[str, Any] | None = None) -> Report:
    """Deploy with the balanced preset, `SMALL` and further recipe keys."""
    values = {**SMALL, "model": None if model is None else str(model), **(options or {})}
    with open_progress("quiet") as progress:
        return run.deploy(load_recipe(options=values), output=output, progress=progress)


def arguments(model: Path | None, output: Path, options: dict[str, Any] | None = None) -> list[str]:
    """The same as a command line."""
    command = [sys.executable, "-m", "pipeline", "deploy"]
    command += [] if model is None else [str(model)]
    for key, value in {**SMALL, **(options or {})}.items():
        command += ["--set", f"{key}={value}"]
    return [*command, "--output", str(output), "--progress", "plain"]


def command_line(
    model: Path | None, output: Path, options: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own."""
    return subprocess.run(
        arguments(model, output, options),
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def digest_of_model(folder: Path) -> str:
    """SHA-256 of the one GGUF file in an output folder."""
    (path,) = folder.glob("*.gguf")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def gate_statuses(report: Report) -> dict[tuple[str, str], str]:
    """Worst status of each (level, runtime) of the ladder."""
    order = ("green", "not run", "red")
    found: dict[tuple[str, str], str] = {}
    for gate in report.gates:
        key = (gate.level, gate.runtime)
        found[key] = max(found.get(key, "green"), gate.status, key=order.index)
    return found
