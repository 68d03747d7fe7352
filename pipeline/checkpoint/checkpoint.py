"""An opened checkpoint: checked from its headers, read one tensor at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.architectures import Architecture, get_architecture
from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.checkpoint.files import read_json
from pipeline.checkpoint.packed import PackedMatrix, find_scheme, unpacked
from pipeline.checkpoint.source import METADATA_FILES, fetch_weights, locate
from pipeline.checkpoint.tying import find_tie
from pipeline.checkpoint.validation import check_tensors, unexpected_notes
from pipeline.checkpoint.weights import Weights, find_weights
from pipeline.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face causal language model on disk.

    Attributes:
        source: What the user gave: a folder or a hub id.
        revision: Commit on the hub, or None.
        folder: Where the files are.
        config: ``config.json`` without ``auto_map`` and with the true ``tie_word_embeddings``.
        architecture: The family.
        tied: Whether the embedding is also the output head.
        notes: What the user should know; nothing that stops a run.
        packed: Matrices that are stored as 4-bit integers and scales already, by name. `read` gives
            what they stand for.
        head_copied: Whether the head is a copy of the embedding that the files do not hold.
    """

    source: str
    revision: str | None
    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    tied: bool
    notes: tuple[str, ...]
    _weights: Weights
    packed: Mapping[str, PackedMatrix] = field(default_factory=dict)
    head_copied: bool = False

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model by name: linears ``[out, in]``; no head if it is tied."""
        return self.architecture.tensors(self.config)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor of the model."""
        return self.shapes[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in memory of its own, all finite.

        Args:
            name: Hugging Face name, one of `shapes`.
            dtype: Type to convert to; None is float32.

        Raises:
            InputError: NaN or infinity in the file, or a value that overflows in `dtype`.
        """
        import torch

        shape = self.shapes[name]
        stored = self._weights.loaders[name]()
        tensor = stored.to(dtype or torch.float32, copy=True).contiguous()
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise self._not_finite(name, stored, tensor)
        return tensor.reshape(shape)

    def _not_finite(self, name: str, stored: Tensor, tensor: Tensor) -> InputError:
        import torch

        index = int(torch.nonzero(~torch.isfinite(tensor.reshape(-1)))[0])
        before, after = float(stored.reshape(-1)[index]), float(tensor.reshape(-1)[index])
        file = self._weights.tensors[name].file
        overflow = math.isfinite(before)
        return InputError(
            f"tensor {name} in {file} is not finite: {after} at flat index {index}",
            why=f"{before} overflows {tensor.dtype}" if overflow else "the weights are broken",
            fix="read it in a wider type" if overflow else "get the checkpoint again, or another",
        )

    @property
    def num_parameters(self) -> int:
        """Weights and biases; a tied head counts once, whether it is copied or not."""
        copied = math.prod(self.shapes[HEAD]) if self.head_copied else 0
        return sum(math.prod(shape) for shape in self.shapes.values()) - copied

    def untied(self) -> Checkpoint:
        """The same model with a tied head as a matrix of its own: a copy of the embedding."""
        tensors = {**self._weights.tensors, HEAD: self._weights.tensors[EMBEDDING]}
        loaders = {**self._weights.loaders, HEAD: self._weights.loaders[EMBEDDING]}
        return replace(
            self,
            tied=False,
            config={**self.config, "tie_word_embeddings": False},
            _weights=replace(self._weights, tensors=tensors, loaders=loaders),
            head_copied=True,
        )

    @property
    def nbytes(self) -> int:
        """Stored size of the tensors of the model, in bytes."""
        return sum(self._weights.tensors[name].nbytes for name in self.shapes)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Every file that the model is made of: weights, config, tokenizer, licence."""
        found = {path for pattern in METADATA_FILES for path in self.folder.glob(pattern)}
        return tuple(sorted(found | set(self._weights.files)))

    def fingerprint(self) -> dict[str, dict[str, str | int]]:
        """SHA-256 and size in bytes of each file, by file name. Reads everything once."""
        result: dict[str, dict[str, str | int]] = {}
        for path in self.files:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            result[path.name] = {"sha256": digest, "size": path.stat().st_size}
        return result

    def validate(self) -> None:
        """Checks from the headers that every tensor is there in the right shape and type.

        `open_checkpoint` has done it already.

        Raises:
            InputError: A tensor is missing or has the wrong shape.
            UnsupportedError: A tensor is not F32, F16 or BF16.
        """
        check_tensors(self.shapes, self._weights.tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder, unchecked but for its syntax. Raises InputError."""
    path = folder / "config.json"
    if not path.exists():
        raise InputError(
            f"{folder} has no config.json", fix="give the folder of a whole Hugging Face model"
        )
    return read_json(path)


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """Opens a model: config first, then the headers of the weights; no weight is read.

    Args:
        source: A folder, or a hub id ``owner/name``.
        revision: Branch, tag or commit on the hub.
        allow_pickle: Accept ``pytorch_model.bin`` where there are no safetensors.

    Raises:
        InputError: Not there, corrupt, incomplete or hostile. Names the file.
        UnsupportedError: A model that would not be computed faithfully.
    """
    location = locate(source, revision)
    config = read_config(location.folder)
    scheme = find_scheme(config)
    if scheme is not None:
        config.pop("quantization_config", None)
        config.pop("compression_config", None)
    architecture = get_architecture(config)
    notes = []
    if config.pop("auto_map", None) is not None:
        notes.append("config.json asks for remote code (auto_map): ignored, nothing of it runs")
    fetch_weights(location, allow_pickle)
    weights = find_weights(location.folder, allow_pickle)
    packed: dict[str, PackedMatrix] = {}
    if scheme is not None:
        weights, packed = unpacked(weights, scheme)
        notes.append(
            f"{len(packed)} matrices are 4-bit already ({scheme.method}) and kept as they are: no "
            "setting of calibration or quantization applies to them, and full precision means this "
            "checkpoint, not its original"
        )
    tied, note = find_tie(weights, bool(config.get("tie_word_embeddings", False)))
    config["tie_word_embeddings"] = tied
    notes += [note] if note else []
    required = architecture.tensors(config)
    check_tensors(required, weights.tensors)
    notes += [*weights.notes, *unexpected_notes(required, weights.tensors)]
    return Checkpoint(
        source=location.source,
        revision=location.revision,
        folder=location.folder,
        config=config,
        architecture=architecture,
        tied=tied,
        notes=tuple(notes),
        _weights=weights,
        packed=packed,
    )
