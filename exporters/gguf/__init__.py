"""GGUF files: packing, metadata, tokenizer, writing; and a strict reader.

Names are resolved on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.gguf.metadata import hyperparameters, rope_factors
    from exporters.gguf.names import (
        SCALED_TYPES,
        gguf_name,
        permute_rope,
        rope_heads,
        scale_name,
        why_unscaled,
    )
    from exporters.gguf.packing import pack
    from exporters.gguf.tokenizer import read_vocabulary
    from exporters.gguf.types import file_type, ggml_type, row_bytes
    from exporters.gguf.unpacking import unpack
    from exporters.gguf.vocabulary import TokenType, Vocabulary
    from exporters.gguf.writer import (
        TensorEntry,
        check_writable,
        header_bytes,
        padded,
        write_gguf,
    )

__all__ = [
    "SCALED_TYPES",
    "TensorEntry",
    "TokenType",
    "Vocabulary",
    "check_writable",
    "file_type",
    "ggml_type",
    "gguf_name",
    "header_bytes",
    "hyperparameters",
    "pack",
    "padded",
    "permute_rope",
    "read_vocabulary",
    "rope_factors",
    "rope_heads",
    "row_bytes",
    "scale_name",
    "unpack",
    "why_unscaled",
    "write_gguf",
]

_HOMES = {
    "metadata": ("hyperparameters", "rope_factors"),
    "names": (
        *("SCALED_TYPES", "gguf_name", "permute_rope", "rope_heads", "scale_name", "why_unscaled"),
    ),
    "packing": ("pack",),
    "tokenizer": ("read_vocabulary",),
    "types": ("file_type", "ggml_type", "row_bytes"),
    "unpacking": ("unpack",),
    "vocabulary": ("TokenType", "Vocabulary"),
    "writer": ("TensorEntry", "check_writable", "header_bytes", "padded", "write_gguf"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
