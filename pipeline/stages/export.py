"""Write the GGUF file: a lossless repack of what the solver decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from exporters.gguf import (
    SCALED_TYPES,
    TensorEntry,
    gguf_name,
    header_bytes,
    padded,
    permute_rope,
    rope_factors,
    rope_heads,
    scale_name,
    write_gguf,
)
from pipeline import __version__
from pipeline.recipe import Recipe
from pipeline.stages.load import Source
from pipeline.stages.plan import TypePlan
from pipeline.stages.quantize import QuantizedModel
from pipeline.stages.stored import digest

ROPE_FACTORS = "rope_freqs.weight"


def export(path: Path, model: QuantizedModel, recipe: Recipe) -> dict[str, Any]:
    """Write the quantized model.

    Args:
        path: File to write.
        model: The finished matrices.
        recipe: Named in the file's metadata.

    Returns:
        For each tensor of the file its type and the SHA-256 of the float32 weights that it stands
        for (what the solver evaluated, or the checkpoint's), in the order of the file's rows. The
        scale of a whole tensor is part of these weights; it is named beside them.
    """
    source = model.source
    promised: dict[str, Any] = {}

    def promise(hf_name: str, kind: str, weights: np.ndarray) -> None:
        target = gguf_name(hf_name)
        in_file_order = _permuted(source, target, weights)
        promised[target] = {"type": kind, "sha256_float32": digest(in_file_order)}

    def rows(hf_name: str) -> np.ndarray:
        if hf_name not in source.plan.types:
            weights = model.read(hf_name).numpy()
            promise(hf_name, "F32", weights)
            return weights
        stored = model.stored(hf_name)
        promise(hf_name, stored.type, stored.dequantize().numpy())
        if stored.tensor_scale is not None:
            promised[gguf_name(hf_name)]["tensor_scale"] = stored.tensor_scale
        return stored.rows()

    def scale(hf_name: str) -> np.ndarray:
        return np.array([model.stored(hf_name).tensor_scale], np.float32)

    write_gguf(
        path,
        tensors=_entries(source, rows, source.plan.types, scale),
        **_description(source, recipe),
    )
    return promised


def method_of(recipe: Recipe, source: Source) -> str:
    """How codes and scales were chosen, for the metadata of a file."""
    if source.packed_by:
        return f"repacked from {source.packed_by}"
    rounding = "nearest" if recipe.imatrix else recipe.quantization.rounding
    return f"{rounding} with {recipe.quantization.scales} scales"


def _description(source: Source, recipe: Recipe) -> dict[str, Any]:
    """What the file says besides its tensors, as arguments of `write_gguf`."""
    return {
        "config": source.checkpoint.config,
        "vocabulary": source.vocabulary,
        "file_type": source.file_type,
        "provenance": {
            "piso.generator": f"piso-deploy {__version__}",
            "piso.method": method_of(recipe, source),
        },
        "name": source.name,
    }


@dataclass(frozen=True)
class FileSizes:
    """What a file takes, before it is written.

    Attributes:
        fixed: Bytes of everything but the matrices of the plan: metadata, tokenizer, norms, scales
            of whole tensors (types with one are no candidates of a budget, but may be pinned).
        shapes: Shape of each matrix of the plan by Hugging Face name.
    """

    fixed: int
    shapes: Mapping[str, tuple[int, ...]]

    def of(self, name: str, kind: str) -> int:
        """Bytes of one matrix in a type, padding included."""
        return padded(TypePlan({name: kind}, ()).size_bytes({name: self.shapes[name]}))

    def total(self, types: Mapping[str, str]) -> int:
        """Bytes of the file with the matrices in these types."""
        return self.fixed + sum(self.of(name, types[name]) for name in self.shapes)


def file_sizes(source: Source, recipe: Recipe) -> FileSizes:
    """Sizes of the file that `export` would write, whatever types its matrices get."""
    entries = _entries(source, _no_data, source.plan.types, _no_data)
    shapes = {name: source.shapes[name] for name in source.plan.types}
    matrices = {gguf_name(name) for name in shapes}
    rest = sum(padded(entry.nbytes) for entry in entries if entry.name not in matrices)
    return FileSizes(header_bytes(tensors=entries, **_description(source, recipe)) + rest, shapes)


def _no_data(hf_name: str) -> np.ndarray:
    return np.zeros(0)


def export_twin(path: Path, read: Callable[[str], Tensor], source: Source) -> None:
    """Write the float twin: the same graph with every matrix dequantized to F32.

    Args:
        path: File to write.
        read: Gives the weights by Hugging Face name.
        source: Configuration, tokenizer and the list of tensors.
    """
    write_gguf(
        path,
        config=source.checkpoint.config,
        vocabulary=source.vocabulary,
        tensors=_entries(source, lambda name: read(name).numpy(), {}),
        file_type="F32",
    )


def _entries(
    source: Source,
    rows: Callable[[str], np.ndarray],
    types: Mapping[str, str],
    scale: Callable[[str], np.ndarray] | None = None,
) -> list[TensorEntry]:
    """All tensors of a file; `scale` gives those of whole tensors, for types that have one."""
    entries = []
    for hf_name, shape in source.shapes.items():
        target = gguf_name(hf_name)

        def read(hf_name: str = hf_name, target: str = target) -> np.ndarray:
            return _permuted(source, target, rows(hf_name))

        kind = types.get(hf_name, "F32")
        entries.append(TensorEntry(target, kind, shape, read))
        if scale is not None and kind in SCALED_TYPES:
            entries.append(TensorEntry(scale_name(target), "F32", (1,), partial(scale, hf_name)))
    factors = rope_factors(source.checkpoint.config)
    if factors is not None:
        entries.append(TensorEntry(ROPE_FACTORS, "F32", factors.shape, lambda: factors))
    return entries


def _permuted(source: Source, target: str, rows: np.ndarray) -> np.ndarray:
    """Rows in the order of the file."""
    heads = rope_heads(source.checkpoint.config, target)
    return rows if heads is None else permute_rope(rows, heads)
