"""Where a model's basis can be changed for nothing: the merge sites of every family, as data.

A `Space` is a set of channels that some tensors write and others read, with nothing in between that
a change would not commute with. New coordinates ``x' = A x`` are merged into both sides, ``A W``
where x is written and ``W A^-1`` where it is read, and the model's function stays.

* ``residual``: written by the embedding, o_proj and down_proj; read by q, k, v, gate, up and the
  head. Its order may change (norm gains follow), and it may be rotated if all gains are one and the
  head is not the embedding.
* ``attention_norm``, ``ffn_norm``, ``final_norm``: written by a norm's gain, read by q, k and v, by
  gate and up, by an untied head. May be scaled.
* ``values``: written by v_proj, read by o_proj through the attention weights. May be scaled,
  reordered and rotated within a key/value head, alike for all query heads that share it.
* ``heads``: the order of query heads, as long as those that share a key/value head stay together.
* ``inner``: written by up_proj, read by down_proj. May be scaled and reordered (gate_proj's rows
  follow the order).

Biases are written too: attention weights sum to one, so a bias of v_proj passes through them. RoPE
fixes the channels of queries and keys, and the q/k norms of Qwen 3 have one gain for all heads, so
neither is a space; neither stands in the way of the others. QuaRot (arXiv 2404.00456, section 4),
SpinQuant (2405.16406, section 3.1), AWQ (2306.00978, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pipeline.architectures.base import EMBEDDING, FINAL_NORM, HEAD, Architecture
from pipeline.architectures.dimensions import Dimensions


class Role(Enum):
    """What a tensor has to do with a space."""

    WRITES = "its rows, or a bias's or gain's entries, are the channels"
    EMBEDS = "its columns are the channels, and it writes them"
    READS = "its columns are the channels, and it reads them"
    READS_SHARED = "likewise, each key/value head's channels once for each of its query heads"
    FOLLOWS = "its rows are in the channels' order and have no scale of theirs"
    GAINS = "the gain of a norm on the channels: follows their order, must be one under a rotation"
    QUERY_HEADS = "its rows are the channels of all query heads"
    KEY_VALUE_HEADS = "its rows are the channels of all key/value heads"
    READS_HEADS = "its columns are the channels of all query heads"


KINDS = ("residual", "attention_norm", "ffn_norm", "final_norm", "values", "heads", "inner")
"""Every kind of space."""


@dataclass(frozen=True)
class Space:
    """Channels in which the model's basis may be changed.

    Attributes:
        kind: One of `KINDS`.
        block: Decoder block, or None for the whole model.
        width: Number of channels; of space ``heads`` the number of query heads.
        allows: ``order``, ``scale`` and ``rotation``, whichever are exact.
        roles: The tensors that see the channels, by Hugging Face name.
        unit: Channels that belong together: nothing may move from one unit to another. The whole
            width where everything may; the head's width for values; a group's heads for heads.
        share: Query heads a key/value head.
        head_dim: Channels a head, for space ``heads``.
    """

    kind: str
    block: int | None
    width: int
    allows: frozenset[str]
    roles: Mapping[str, Role] = field(hash=False)
    unit: int
    share: int = 1
    head_dim: int = 1

    @property
    def name(self) -> str:
        """For messages and for storing: ``residual``, ``block 3 inner``."""
        return self.kind if self.block is None else f"block {self.block} {self.kind}"

    def with_role(self, *roles: Role) -> list[str]:
        """Names of the tensors in one of these roles."""
        return [name for name, role in self.roles.items() if role in roles]


def spaces_of(architecture: Architecture, config: Mapping[str, Any]) -> tuple[Space, ...]:
    """Every space of a model: that of the residual stream first, then block by block.

    Args:
        architecture: The family.
        config: The content of ``config.json``, with the true ``tie_word_embeddings``.
    """
    size = architecture.dimensions(config)
    tied = bool(config.get("tie_word_embeddings", False))
    tensors = architecture.tensors(config)
    found = [_residual(architecture, size, tied, tensors)]
    for index in range(size.layers):
        prefix = architecture.block_prefix(index)
        own = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
        found += _of_block(index, size, own)
    if not tied:
        roles = {FINAL_NORM: Role.WRITES, HEAD: Role.READS}
        found.append(Space("final_norm", None, size.hidden, SCALE, roles, size.hidden))
    return tuple(found)


SCALE = frozenset({"scale"})


def _residual(
    architecture: Architecture, size: Dimensions, tied: bool, tensors: Mapping[str, Any]
) -> Space:
    roles = {}
    for name in tensors:
        leaf = name.rpartition(".")[0].rpartition(".")[2]
        if name == EMBEDDING:
            roles[name] = Role.EMBEDS
        elif leaf.endswith("layernorm") or name == FINAL_NORM:
            roles[name] = Role.GAINS
        elif leaf in ("o_proj", "down_proj"):
            roles[name] = Role.WRITES
        elif name == HEAD or (leaf.endswith("_proj") and name.endswith(".weight")):
            roles[name] = Role.READS
    allows = frozenset({"order"} if tied else {"order", "rotation"})
    return Space("residual", None, size.hidden, allows, roles, size.hidden)


def _of_block(index: int, size: Dimensions, own: Mapping[str, str]) -> list[Space]:
    """Spaces inside one block, from its tensors' full names by their names in the block."""

    def roles(**wanted: Role) -> dict[str, Role]:
        return {
            own[f"{module}.{part}"]: role
            for leaf, role in wanted.items()
            for module in (f"self_attn.{leaf}", f"mlp.{leaf}", leaf)
            for part in ("weight", "bias")
            if f"{module}.{part}" in own and not (part == "bias" and role in COLUMNS)
        }

    share = size.heads // size.kv_heads
    reads, writes, follows = Role.READS, Role.WRITES, Role.FOLLOWS
    qkv = roles(input_layernorm=writes, q_proj=reads, k_proj=reads, v_proj=reads)
    gate_up = roles(post_attention_layernorm=writes, gate_proj=reads, up_proj=reads)
    values = roles(v_proj=writes, o_proj=Role.READS_SHARED)
    heads = roles(
        q_proj=Role.QUERY_HEADS,
        k_proj=Role.KEY_VALUE_HEADS,
        v_proj=Role.KEY_VALUE_HEADS,
        o_proj=Role.READS_HEADS,
    )
    inner = roles(up_proj=writes, gate_proj=follows, down_proj=reads)
    everything = frozenset({"order", "scale", "rotation"})
    return [
        Space("attention_norm", index, size.hidden, SCALE, qkv, size.hidden),
        Space(
            "values", index, size.kv_heads * size.head_dim, everything, values, size.head_dim, share
        ),
        Space(
            "heads",
            index,
            size.heads,
            frozenset({"order"}),
            heads,
            share,
            share,
            head_dim=size.head_dim,
        ),
        Space("ffn_norm", index, size.hidden, SCALE, gate_up, size.hidden),
        Space(
            "inner",
            index,
            size.intermediate,
            frozenset({"order", "scale"}),
            inner,
            size.intermediate,
        ),
    ]


def online_spaces(architecture: Architecture, config: Mapping[str, Any]) -> tuple[Space, ...]:
    """Inputs of down_proj, which only a rotation at run time can rotate: one side is merged."""
    width = architecture.dimensions(config).intermediate
    layers = range(architecture.dimensions(config).layers)
    names = [f"{architecture.block_prefix(n)}mlp.down_proj.weight" for n in layers]
    rotation = frozenset({"rotation"})
    return tuple(
        Space("online", n, width, rotation, {name: Role.READS}, width)
        for n, name in enumerate(names)
    )


COLUMNS = (Role.EMBEDS, Role.READS, Role.READS_SHARED, Role.READS_HEADS)
"""Roles of matrices only: a bias has no columns."""
