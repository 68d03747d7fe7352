"""What decides the bits of a run: recipe, inputs, versions, threads, machine."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch

from pipeline import __version__
from pipeline.recipe import Recipe
from pipeline.stages.calibrate import Texts
from pipeline.stages.load import Source

VERSIONED = ("torch", "transformers", "numpy", "numba", "gguf", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of everything that decides the bytes, and of llama-cpp-python if it is there."""
    found = {"piso-deploy": __version__, "python": platform.python_version()}
    for package in (*VERSIONED, "llama-cpp-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def identity_of_run(recipe: Recipe, source: Source, texts: Texts) -> dict[str, Any]:
    """Everything that decides the bits of a block."""
    tokens = hashlib.sha256(texts.calibration.numpy().tobytes()).hexdigest()
    files = json.dumps(source.description["files"], sort_keys=True)
    decisive = {f"recipe.{k}": v for k, v in recipe.decisive().items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in decisive.items()}
    decided = {name: version for name, version in versions().items() if name != "llama-cpp-python"}
    return {
        **plain,
        **{f"version.{k}": v for k, v in decided.items()},
        "checkpoint": hashlib.sha256(files.encode()).hexdigest(),
        "calibration tokens": tokens,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def identity_of_importance(importance: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The numbers of an importance matrix: its file may change between two runs."""
    if not importance:
        return {}
    digest = hashlib.sha256()
    for name, vector in sorted(importance.items()):
        digest.update(name.encode() + vector.tobytes())
    return {"importance": digest.hexdigest()}
