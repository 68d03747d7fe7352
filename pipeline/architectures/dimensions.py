"""The sizes of a decoder-only transformer, read from its config with distrust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError

# Far above any real model; a hostile config must not make us enumerate 10^12 tensors.
MAX_LAYERS = 4096
MAX_SIZE = 1 << 27


@dataclass(frozen=True)
class Dimensions:
    """Sizes that fix every weight shape.

    Attributes:
        vocab: Rows of the embedding.
        hidden: Width of the residual stream.
        intermediate: Width inside the feed-forward network.
        layers: Decoder blocks.
        heads: Query heads.
        kv_heads: Key and value heads; each serves ``heads / kv_heads`` query heads (GQA).
        head_dim: Width of one head; not always ``hidden / heads``.
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], default_head_dim: int | None = None
    ) -> Dimensions:
        """Reads and checks the sizes.

        Args:
            config: The content of ``config.json``.
            default_head_dim: Head width when the config names none; None means ``hidden / heads``.

        Raises:
            InputError: A size is missing, not a positive integer, absurd, or does not divide.
        """
        hidden = _size(config, "hidden_size")
        heads = _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise InputError(
                f"config.json: {heads} query heads cannot share {kv_heads} key/value heads",
                why="num_attention_heads must be a multiple of num_key_value_heads",
            )
        if config.get("head_dim") is None and default_head_dim is None and hidden % heads:
            raise InputError(
                f"config.json: hidden_size {hidden} is not a multiple of {heads} heads",
                fix="such a model must name its head_dim",
            )
        head_dim = _size(config, "head_dim", default=default_head_dim or max(1, hidden // heads))
        if head_dim % 2:
            raise InputError(
                f"config.json: head_dim {head_dim} is odd", why="RoPE rotates pairs of channels"
            )
        return cls(
            vocab=_size(config, "vocab_size"),
            hidden=hidden,
            intermediate=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers", limit=MAX_LAYERS),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )


def _size(
    config: Mapping[str, Any], key: str, *, default: int | None = None, limit: int = MAX_SIZE
) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= limit:
        raise InputError(
            f"config.json: {key} is {value!r}", why=f"it must be an integer from 1 to {limit}"
        )
    return value
