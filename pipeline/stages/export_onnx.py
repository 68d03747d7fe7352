"""Write the ONNX folder: graph, weights, and what Optimum and onnxruntime-genai look for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporters.onnx import Rotary, WeightEntry, integer_weight, write_onnx
from exporters.onnx.decoder import decoder_model
from exporters.onnx.entries import Content
from exporters.onnx.integers import canonical
from exporters.onnx.rotation import KroneckerPair
from pipeline.quantization.formats import QuantizedTensor
from pipeline.recipe import Recipe
from pipeline.stages.export import method_of
from pipeline.stages.load import Source
from pipeline.stages.quantize import QuantizedModel
from pipeline.stages.stored import digest
from pipeline.storage import reported
from pipeline.transforms.changes import run_time_rotation
from pipeline.transforms.online import kronecker_pair
from pipeline.versions import decisive_versions, versions
from runtimes.torch_reference import TorchReference

COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
"""Files that go with the model as they are."""

LOCAL = ("model", "imatrix", "calibration.source")
"""Recipe keys that are left out of the file: paths say nothing on another machine."""


def check_onnx(source: Source, recipe: Recipe) -> None:
    """Refuse what cannot be written, before any expensive work: builds the graph without weights,
    if there is an ONNX target.

    Raises:
        UnsupportedError: ONNX or ONNX Runtime cannot hold or compute it.
    """
    if "onnx" not in recipe.targets:
        return

    def unread(name: str) -> Content:
        raise ValueError(f"{name} is not to be read")

    entries = _entries(source, unread, recipe)
    config, attention = source.checkpoint.config, recipe.onnx.attention
    decoder_model(config, entries, rotary_of(source), attention)


def export_onnx(folder: Path, model: QuantizedModel, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
    """Write the quantized model into a folder.

    Args:
        folder: Where to.
        model: The finished matrices.
        recipe: Says which operators to use, and is named in the file's metadata.

    Returns:
        The graph's path, and for each tensor its type and the SHA-256 of the float32 weights that
        it stands for and, if it is quantized, of its codes and scales.
    """
    source = model.source
    promised: dict[str, Any] = {}

    def read(name: str) -> Content:
        if name not in source.plan.types:
            weights = model.read(name).numpy()
            promised[name] = {"type": "F32", "sha256_float32": digest(weights)}
            return weights
        stored = model.stored(name)
        promised[name] = promise(stored.type, stored.content)
        if isinstance(stored.content, QuantizedTensor):
            return integer_weight(stored.content, name)
        return stored.content.numpy()

    settings = {k: v for k, v in recipe.decisive().items() if k not in LOCAL}
    path = write_onnx(
        folder,
        config=source.checkpoint.config,
        entries=_entries(source, read, recipe),
        rotary=rotary_of(source),
        attention=recipe.onnx.attention,
        inner_rotation=_inner_rotation(source),
        provenance={
            "piso.generator": f"piso-deploy {versions()['piso-deploy']}",
            "piso.method": method_of(recipe, source),
            "piso.recipe": json.dumps(settings, sort_keys=True),
            "piso.versions": json.dumps(decisive_versions(), sort_keys=True),
        },
    )
    _add_companions(folder, source)
    return path, promised


def promise(kind: str, content: QuantizedTensor | torch.Tensor) -> dict[str, str]:
    """Type and digests of a matrix, by which `verify` knows it again."""
    if not isinstance(content, QuantizedTensor):
        return {"type": kind, "sha256_float32": digest(content)}
    content = canonical(content)
    stored = hashlib.sha256(content.codes.numpy().tobytes())
    for name, field in sorted(content.scales.items()):
        stored.update(name.encode() + np.ascontiguousarray(field.numpy()).tobytes())
    return {
        "type": kind,
        "sha256_float32": digest(content.dequantize()),
        "sha256_stored": stored.hexdigest(),
    }


def _entries(source: Source, read: Callable[[str], Content], recipe: Recipe) -> list[WeightEntry]:
    def entry(name: str, shape: tuple[int, ...]) -> WeightEntry:
        kind = source.plan.types.get(name, "F32")
        return WeightEntry(name, kind, shape, lambda: read(name), recipe.onnx.packed)

    return [entry(name, shape) for name, shape in source.shapes.items()]


def rotary_of(source: Source) -> Rotary:
    """The model's position embedding."""
    frequencies, magnitude = TorchReference(source.config, source.read).rotary
    return Rotary(frequencies, magnitude)


def _inner_rotation(source: Source) -> KroneckerPair | None:
    """What the graph rotates the inputs of down_proj by."""
    rotation = run_time_rotation(source.changes)
    return None if rotation is None else kronecker_pair(rotation)


def _add_companions(folder: Path, source: Source) -> None:
    """Config and tokenizer, so that Optimum and transformers load the folder."""
    checkpoint = source.checkpoint
    with reported(f"write to {folder}"):
        text = json.dumps(checkpoint.config, indent=2, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        for path in checkpoint.files:
            if path.name in COPIED:
                shutil.copyfile(path, folder / path.name)
        if not (folder / "tokenizer.json").exists():
            tokenizer = source.tokenizer.backend_tokenizer.to_str()
            (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
