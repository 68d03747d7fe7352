"""Which form of a hot loop runs: decided by where the tensors are."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor


def gpu_form(name: str, tensor: Tensor) -> ModuleType:
    """The module of a hot loop for a tensor that is not on the CPU.

    Triton where the tensor is on a CUDA device and Triton is installed (CUDA builds of PyTorch
    bring it), the plain PyTorch twin elsewhere.

    Args:
        name: Module name, the same in `pipeline.kernels.gpu` and `pipeline.kernels.twin`.
        tensor: One of the arguments.
    """
    compiled = tensor.device.type == "cuda" and _has_triton()
    return import_module(f"pipeline.kernels.{'gpu' if compiled else 'twin'}.{name}")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
