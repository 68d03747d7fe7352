"""Versions of everything that decides the bytes of an output."""

from __future__ import annotations

import platform
from importlib import metadata

from pipeline import __version__

DECISIVE = (
    *("torch", "transformers", "numpy", "numba", "gguf", "tokenizers", "safetensors"),
    *("onnx-ir", "ml_dtypes"),
)
RUNTIMES = ("llama-cpp-python", "onnxruntime")
"""Packages that run what was written, and do not decide what that is."""


def versions() -> dict[str, str]:
    """Versions of everything that decides the bytes, and of the runtimes that are installed."""
    found = {"piso-deploy": __version__, "python": platform.python_version()}
    for package in (*DECISIVE, *RUNTIMES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def decisive_versions() -> dict[str, str]:
    """The same without the runtimes: a resume after one was upgraded gives the same bytes."""
    return {name: version for name, version in versions().items() if name not in RUNTIMES}
