"""Writes checkpoint files byte by byte, to make what no library would write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@contextmanager
def edited(folder: Path, name: str = "config.json") -> Iterator[dict[str, Any]]:
    """The content of a JSON file, written back after the change."""
    path = folder / name
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


@contextmanager
def edited_weights(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a single-file checkpoint, written back after the change."""
    tensors = load_file(folder / WEIGHTS)
    yield tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)


def shard(folder: Path, parts: int = 2) -> list[Path]:
    """Turns a single-file checkpoint into shards with an index; returns the shards."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    weight_map = {key: names[i % parts] for i, key in enumerate(tensors)}
    for name in names:
        save_file({k: tensors[k] for k, n in weight_map.items() if n == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / name for name in names]


def header_bytes(path: Path) -> int:
    """Bytes before the first tensor of a safetensors file."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")
