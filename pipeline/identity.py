"""What decides the bits of a run's matrices: a resume under another identity is refused."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pipeline.recipe import Recipe
from pipeline.stages.calibrate import Texts
from pipeline.stages.load import Source
from pipeline.stages.walk import choose_device
from pipeline.versions import decisive_versions


def identity_of_run(recipe: Recipe, source: Source, texts: Texts) -> dict[str, Any]:
    """Everything that decides the bits of a block."""
    tokens = hashlib.sha256(texts.calibration.numpy().tobytes()).hexdigest()
    files = json.dumps(source.description["files"], sort_keys=True)
    decisive = {f"recipe.{k}": v for k, v in recipe.decisive().items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in decisive.items()}
    return {
        **plain,
        **{f"version.{k}": v for k, v in decisive_versions().items()},
        "checkpoint": hashlib.sha256(files.encode()).hexdigest(),
        "calibration tokens": tokens,
        "threads": torch.get_num_threads(),
        "device": choose_device(recipe.device).type,
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
