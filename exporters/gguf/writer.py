"""Writes a GGUF file: metadata, tensor infos, then one tensor at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from exporters.gguf.fields import Config, KeyValue
from exporters.gguf.inventory import check_inventory
from exporters.gguf.metadata import hyperparameters
from exporters.gguf.types import file_type as file_type_id
from exporters.gguf.types import ggml_type, row_bytes
from exporters.gguf.vocabulary import Vocabulary
from pipeline.errors import (
    InputError,
    ResourceError,
    UnsupportedError,
    UsageError,
    VerificationError,
)

_FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_MAX_NAME_BYTES = 63  # GGML_MAX_NAME with the terminating zero
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# llama.cpp strips spaces around special tokens of models that are called like this.
_TELLING_NAMES = ("phi-3", "phi3", "modern-bert")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to write.

    Attributes:
        name: GGUF name.
        type: ggml type.
        shape: In the order of torch, [out, in].
        read: Gives the data: float32 of `shape` for F32 and F16, otherwise packed rows, uint8
            [out, row bytes]. Called once, when the tensor is written.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    read: Callable[[], NDArray[np.generic]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file, without padding."""
        return prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1])


def check_writable(
    config: Config, vocabulary: Vocabulary | None, names: Collection[str], name: str = ""
) -> None:
    """Every check of `write_gguf` that needs no tensor data, to refuse before expensive work.

    Args:
        config: Content of the Hugging Face config.json.
        vocabulary: Tokenizer; None for a file that only takes token ids.
        names: GGUF names of all tensors of the model.
        name: Name of the model for people; empty for none.

    Raises:
        InputError: A tensor is missing, a text is not Unicode, or the config makes no sense.
        UnsupportedError: Stock llama.cpp would not load the file, or compute something else.
    """
    _check_text([*_head(name), *hyperparameters(config), *_tokenizer(vocabulary)])
    if vocabulary is not None:
        _check_vocabulary(vocabulary, config, name)
    _check_names(names)
    check_inventory(config, names)


def write_gguf(
    path: Path,
    *,
    config: Config,
    vocabulary: Vocabulary | None,
    tensors: Sequence[TensorEntry],
    file_type: str,
    provenance: Mapping[str, str] | None = None,
    name: str = "",
) -> None:
    """Writes a model that stock llama.cpp loads. The same input gives the same bytes.

    Holds one tensor in memory at a time. An existing file is overwritten; an error leaves an
    incomplete one, so write under a temporary name and rename.

    Args:
        path: File to write.
        config: Content of the Hugging Face config.json.
        vocabulary: Tokenizer; None for a file that only takes token ids.
        tensors: All tensors of the model, in the order to write them.
        file_type: ggml type that most weights have.
        provenance: More text entries, with keys that start with ``general.`` or ``piso.``.
        name: Name of the model for people; empty for none.

    Raises:
        InputError: A tensor is missing or not finite, or the config makes no sense.
        UnsupportedError: Stock llama.cpp would not load the file, or compute something else.
        VerificationError: Data that are not what their entry announces.
        UsageError: A provenance key that is not free.
        ResourceError: The disk is full or the file cannot be written.
    """
    check_writable(config, vocabulary, [entry.name for entry in tensors], name)
    _check_shapes(tensors)
    metadata = _metadata(config, vocabulary, file_type, name, provenance or {})
    with _head_written(path, config, metadata, tensors) as writer:
        _write(path, writer, tensors)


def header_bytes(
    *,
    config: Config,
    vocabulary: Vocabulary | None,
    tensors: Sequence[TensorEntry],
    file_type: str,
    provenance: Mapping[str, str] | None = None,
    name: str = "",
) -> int:
    """Bytes before the first tensor's data in the file that `write_gguf` makes of the same
    arguments, padding included; no tensor is read.

    They do not depend on the tensors' types nor on the file type, only on names and shapes.
    """
    metadata = _metadata(config, vocabulary, file_type, name, provenance or {})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        with _head_written(path, config, metadata, tensors):
            pass
        return padded(path.stat().st_size)


def padded(nbytes: int) -> int:
    """Bytes that data take in the file: each tensor's begin at a multiple of the alignment."""
    return -(-nbytes // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


@contextmanager
def _head_written(
    path: Path, config: Config, metadata: Sequence[KeyValue], tensors: Sequence[TensorEntry]
) -> Iterator[GGUFWriter]:
    """A writer that is about to write the first tensor's data."""
    with _disk_errors(path):
        writer = GGUFWriter(path, config["model_type"])
        for key, kind, value in metadata:
            _add(writer, key, kind, value)
        for entry in tensors:
            # A float dtype makes the writer take the shape as it is, for types it knows and not.
            writer.add_tensor_info(
                entry.name,
                entry.shape,
                np.dtype(np.float32),
                entry.nbytes,
                raw_dtype=ggml_type(entry.type).type_id,
            )
        writer.open_output_file()
    try:
        with _disk_errors(path):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        yield writer
    finally:
        with _disk_errors(path):
            writer.close()


def _write(path: Path, writer: GGUFWriter, tensors: Sequence[TensorEntry]) -> None:
    for entry in tensors:
        stored = _stored(entry)
        with _disk_errors(path):
            writer.write_tensor_data(stored)
        del stored
    with _disk_errors(path):
        writer.flush()
        os.fsync(writer.fout[0].fileno())


def _metadata(
    config: Config,
    vocabulary: Vocabulary | None,
    file_type: str,
    name: str,
    provenance: Mapping[str, str],
) -> list[KeyValue]:
    entries = [
        *_head(name),
        KeyValue("general.file_type", "uint32", file_type_id(file_type)),
        KeyValue("general.quantization_version", "uint32", _QUANTIZATION_VERSION),
        *hyperparameters(config),
        *_tokenizer(vocabulary),
    ]
    taken = {entry.key for entry in entries} | {"general.architecture", "general.alignment"}
    for key, text in provenance.items():
        if not key.startswith(("general.", "piso.")) or key in taken:
            raise UsageError(
                f"provenance key {key!r}",
                why="it must start with general. or piso. and not be one that the exporter writes",
            )
        entries.append(KeyValue(key, "string", text))
    _check_text(entries)
    return entries


def _head(name: str) -> list[KeyValue]:
    entries = [KeyValue("general.type", "string", "model")]
    return [*entries, KeyValue("general.name", "string", name)] if name else entries


def _tokenizer(vocabulary: Vocabulary | None) -> list[KeyValue]:
    if vocabulary is None:
        return [KeyValue("tokenizer.ggml.model", "string", "none")]
    return vocabulary.metadata()


def _check_text(entries: Sequence[KeyValue]) -> None:
    for key, kind, value in entries:
        if kind not in ("string", "string[]"):
            continue
        try:
            "".join(value).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{key} is not valid Unicode text", why=error.reason) from None


def _check_vocabulary(vocabulary: Vocabulary, config: Config, name: str) -> None:
    if len(vocabulary.tokens) != config["vocab_size"]:
        raise InputError(
            f"{len(vocabulary.tokens)} tokens for an embedding of {config['vocab_size']} rows"
        )
    if any(word in name.lower() for word in _TELLING_NAMES):
        raise UnsupportedError(
            f"the model name {name!r}",
            why="llama.cpp changes its tokenizer for models whose name contains "
            + " or ".join(_TELLING_NAMES),
            fix="choose another name",
        )


def _check_names(names: Collection[str]) -> None:
    for name in names:
        if not 0 < len(name.encode()) <= _MAX_NAME_BYTES:
            raise UnsupportedError(
                f"tensor name {name!r}", why=f"GGUF names have 1 to {_MAX_NAME_BYTES} bytes"
            )
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"tensor {twice[0]} is listed twice")


def _check_shapes(tensors: Sequence[TensorEntry]) -> None:
    for entry in tensors:
        if not 1 <= len(entry.shape) <= 4 or min(entry.shape) <= 0:
            raise InputError(f"tensor {entry.name} has shape {entry.shape}")
        row_bytes(entry.type, entry.shape[-1])


def _stored(entry: TensorEntry) -> NDArray[np.generic]:
    """The data of a tensor as they are written, checked against its entry."""
    data = entry.read()
    packed_rows = (prod(entry.shape[:-1]), row_bytes(entry.type, entry.shape[-1]))
    floats = entry.type in _FLOATS
    dtype, shape = (np.float32, entry.shape) if floats else (np.uint8, packed_rows)
    if data.dtype != dtype or data.shape != shape:
        raise VerificationError(
            f"tensor {entry.name} is {data.dtype} {data.shape}",
            why=f"its entry announces {entry.type} {entry.shape}: {np.dtype(dtype)} {shape}",
        )
    if not floats:
        return np.ascontiguousarray(data)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(data, dtype=_FLOATS[entry.type])
    if not np.isfinite(stored).all():
        raise InputError(
            f"tensor {entry.name} holds values that are not finite in {entry.type}",
            why="a damaged checkpoint, or weights beyond the range of the type",
        )
    return stored


def _add(writer: GGUFWriter, key: str, kind: str, value: object) -> None:
    if kind.endswith("[]"):
        element = GGUFValueType[kind.removesuffix("[]").upper()]
        writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=element)
    else:
        writer.add_key_value(key, value, GGUFValueType[kind.upper()])


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}", why=str(error), fix="free disk space or choose another folder"
        ) from error
