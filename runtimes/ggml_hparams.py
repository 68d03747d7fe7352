"""Hyperparameters of a GGUF file as llama.cpp reads them (load_hparams in llama-model.cpp)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from exporters.gguf.reader import quoted
from pipeline.errors import InputError, UnsupportedError
from runtimes.ggml_rope import Rope

ARCHITECTURES = ("llama", "qwen2", "qwen3")
_MAX_SIZE = 1 << 31


@dataclass(frozen=True)
class Hyperparameters:
    """Sizes of a dense decoder.

    Attributes:
        architecture: ``llama``, ``qwen2`` or ``qwen3``.
        blocks: Decoder blocks.
        hidden: Width of the residual stream.
        feed_forward: Width of the gated MLP.
        heads: Query heads.
        kv_heads: Key and value heads; divides `heads`.
        head_dim: Width of a head.
        rms_epsilon: Added to the mean square in every norm.
        rope: Rotary embedding.
    """

    architecture: str
    blocks: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_epsilon: float
    rope: Rope


def read_hyperparameters(metadata: Mapping[str, Any]) -> Hyperparameters:
    """Hyperparameters from GGUF metadata.

    Raises:
        InputError: A value is missing or impossible.
        UnsupportedError: Another architecture, or a variant of it that is not implemented.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {quoted(str(architecture))} in the GGUF file",
            fix=f"known: {', '.join(ARCHITECTURES)}; run others in llama.cpp itself",
        )
    fields = _Fields(metadata, architecture)
    if fields.get("expert_count", 0) != 0:
        raise UnsupportedError("mixture-of-experts models are not supported")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    kv_heads = fields.integer("attention.head_count_kv", heads)
    head_dim = fields.integer("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise UnsupportedError(f"{architecture}.{key} differs from the key length {head_dim}")
    if heads % kv_heads or head_dim % 2:
        raise InputError(f"{heads} heads of {head_dim} cannot share {kv_heads} key-value heads")
    return Hyperparameters(
        architecture=architecture,
        blocks=fields.integer("block_count"),
        hidden=hidden,
        feed_forward=fields.integer("feed_forward_length"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rms_epsilon=fields.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(fields, head_dim),
    )


class _Fields:
    """Checked access to the keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self.architecture = architecture

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, whatever it is."""
        return self._metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A value that must be a positive integer."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < _MAX_SIZE:
            self._refuse(key, value, "a positive integer")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A value that must be a positive finite number."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self._refuse(key, value, "a positive number")
        return float(value)

    def _refuse(self, key: str, value: object, expected: str) -> NoReturn:
        if isinstance(value, list):
            raise UnsupportedError(f"{self.architecture}.{key} differs from block to block")
        found = "missing" if value is None else quoted(str(value))
        raise InputError(f"{self.architecture}.{key} is {found}, expected {expected}")


def _rope(fields: _Fields, head_dim: int) -> Rope:
    """Rotary embedding; of the YaRN keys llama.cpp reads none but the original context here."""
    kind = fields.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"rope scaling {quoted(str(kind))} in the GGUF file")
    old_factor = fields.get("rope.scale_linear", 0.0)
    factor = fields.get("rope.scaling.factor", old_factor)
    scaled = kind != "none" and factor != 0
    base = fields.number("rope.freq_base", 10000.0)
    if base <= 1:
        raise InputError(f"{fields.architecture}.rope.freq_base is {base}, expected more than 1")
    return Rope(
        dimensions=head_dim,
        base=base,
        factor=fields.number("rope.scaling.factor", old_factor) if scaled else 1.0,
        yarn=kind == "yarn",
        original_context=fields.integer(
            "rope.scaling.original_context_length", fields.integer("context_length")
        ),
        magnitude=fields.number("rope.scaling.attn_factor", 1.0),
        interleaved=fields.architecture == "llama",
    )
