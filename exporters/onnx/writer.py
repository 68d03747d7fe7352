"""Writes a decoder as ONNX: the graph in one file, its weights in another beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.config_fields import Config
from exporters.onnx.attention import AttentionKind
from exporters.onnx.decoder import decoder_model
from exporters.onnx.entries import WeightEntry
from exporters.onnx.genai import genai_config
from exporters.onnx.names import DATA, EMBEDDING, GENAI_CONFIG, HEAD, MODEL, PROVENANCE, TYPES
from exporters.onnx.rotation import KroneckerPair
from exporters.onnx.size import Rotary
from pipeline.errors import PipelineError, ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

EXTERNAL_BYTES = 1024
"""Larger tensors go to the data file."""

PAGE, PADDED_BYTES = 4096, 1 << 16
"""Tensors larger than the second number start at multiples of the first, to be mapped."""


def write_onnx(
    folder: Path,
    *,
    config: Config,
    entries: Sequence[WeightEntry],
    rotary: Rotary,
    attention: AttentionKind = "standard",
    provenance: Mapping[str, str] | None = None,
    inner_rotation: KroneckerPair | None = None,
) -> Path:
    """Writes `MODEL`, `DATA` and `GENAI_CONFIG` into a folder. The same input gives the same bytes.

    Holds one tensor in memory at a time. The files appear when all of them are complete, `MODEL`
    last; after an error the folder is as it was.

    Args:
        folder: Existing folder; older files of these names are replaced, others are left.
        config: Content of the Hugging Face config.json.
        entries: All tensors of the model.
        rotary: Position embedding.
        attention: Operators to use, see `exporters.onnx.attention`.
        provenance: More metadata, under keys that start with `PROVENANCE`.
        inner_rotation: Rotates the input of every down_proj, see `exporters.onnx.rotation`.

    Returns:
        Path of `MODEL`.

    Raises:
        InputError: A tensor is missing or not finite, or the config makes no sense.
        UnsupportedError: ONNX or ONNX Runtime cannot hold or compute it.
        VerificationError: Data that are not what their entry announces.
        UsageError: A provenance key that is not free.
        ResourceError: The disk is full or a file cannot be written.
    """
    model = decoder_model(config, entries, rotary, attention, inner_rotation)
    model.metadata_props.update(_metadata(entries, provenance or {}))
    head = HEAD in {entry.name for entry in entries}
    products = [entry for entry in entries if entry.name != EMBEDDING or not head]
    widths = {entry.product_bits for entry in products} - {None}
    genai = genai_config(config, exact=widths == {4})
    with _staging(folder) as staging, _unwrapped():
        ir.save(
            model,
            staging / MODEL,
            external_data=DATA,
            size_threshold_bytes=EXTERNAL_BYTES,
            alignment=PAGE,
            align_threshold=PADDED_BYTES,
        )
        text = json.dumps(genai, indent=2, ensure_ascii=False)
        (staging / GENAI_CONFIG).write_text(text + "\n", encoding="utf-8")
    return folder / MODEL


def _metadata(entries: Sequence[WeightEntry], provenance: Mapping[str, str]) -> dict[str, str]:
    for key in provenance:
        if not key.startswith(PROVENANCE) or key == TYPES:
            raise UsageError(
                f"provenance key {key!r}",
                why=f"it must start with {PROVENANCE} and not be one that the exporter writes",
            )
    types = {entry.name: entry.type for entry in entries}
    return {**provenance, TYPES: json.dumps(types, sort_keys=True)}


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder to fill, whose files move into `folder` when the block ends without an exception.

    Raises:
        ResourceError: The disk refuses.
    """
    staging = folder / f".{MODEL}.partial"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        for path in staging.iterdir():
            _sync(path)
        # A graph must never lie beside weights that are not its own.
        (folder / MODEL).unlink(missing_ok=True)
        for name in (DATA, GENAI_CONFIG, MODEL):
            (staging / name).replace(folder / name)
    except OSError as error:
        raise ResourceError(
            f"cannot write {folder / MODEL}",
            why=str(error),
            fix="free disk space or choose another folder",
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise what reading a small tensor raised, not what onnx_ir wraps around it at each level."""
    try:
        yield
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, PipelineError | OSError):
            raise cause from None
        raise


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
