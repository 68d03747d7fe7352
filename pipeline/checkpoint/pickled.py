"""Pickled PyTorch weights, for those who insist: tensors only, no other objects."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint.header import TensorInfo
from pipeline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def read_pickle(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Callable[[], Tensor]]]:
    """Tensors of a file written by ``torch.save``, mapped into memory, not read.

    Raises:
        InputError: Not such a file, or it holds anything but tensors by name.
    """
    import torch

    names = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float64: "F64",
        torch.int64: "I64",
        torch.int32: "I32",
    }
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler raises whatever the file makes it raise
        raise InputError(
            f"cannot read the pickled weights {path}",
            why=str(error).splitlines()[0] if str(error) else type(error).__name__,
            fix="get a safetensors version of the model",
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise InputError(f"{path} holds something other than tensors by name")
    tensors = {
        name: TensorInfo(
            path, names.get(value.dtype, str(value.dtype)), tuple(value.shape), value.nbytes
        )
        for name, value in state.items()
    }
    return tensors, {name: partial(state.__getitem__, name) for name in state}
