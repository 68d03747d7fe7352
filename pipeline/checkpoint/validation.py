"""Does a checkpoint hold the model that its config describes? Headers only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from exporters.untrusted import quoted
from pipeline.architectures.base import HEAD
from pipeline.checkpoint.header import TensorInfo
from pipeline.errors import InputError, UnsupportedError

FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})
LISTED = 4


def check_tensors(
    required: Mapping[str, tuple[int, ...]], present: Mapping[str, TensorInfo]
) -> None:
    """Compares what the architecture needs with what the files hold.

    Raises:
        InputError: Tensors are missing or have other shapes.
        UnsupportedError: A tensor is not F32, F16 or BF16.
    """
    missing = [name for name in required if name not in present]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(required)} tensors are missing: {_some(missing)}",
            why="the files do not hold the model that config.json describes",
            fix="download the whole model again, from one revision",
        )
    for name, shape in required.items():
        info = present[name]
        if info.shape != shape:
            raise InputError(
                f"tensor {name} has shape {list(info.shape)}, config.json implies {list(shape)}",
                why=f"{info.file} and config.json do not belong together",
                fix="download the whole model again, from one revision",
            )
        if info.dtype not in FLOAT_DTYPES:
            raise UnsupportedError(
                f"tensor {name} in {info.file} is stored as {info.dtype}",
                why=f"full-precision weights are {', '.join(sorted(FLOAT_DTYPES))}",
                fix="give the original, unquantized checkpoint",
            )


def unexpected_notes(required: Iterable[str], present: Iterable[str]) -> list[str]:
    """A note for tensors that the model does not use (RoPE buffers of old exports aside)."""
    extra = sorted(
        name
        for name in set(present) - set(required)
        if name != HEAD and not name.endswith("rotary_emb.inv_freq")
    )
    return [f"{len(extra)} tensors are not part of the model: {_some(extra)}"] if extra else []


def _some(names: list[str]) -> str:
    return ", ".join(quoted(name) for name in names[:LISTED]) + (
        ", ..." if len(names) > LISTED else ""
    )
