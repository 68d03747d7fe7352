"""What the pipeline needs to know about a family of models, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.architectures.checks import check_config
from pipeline.architectures.dimensions import Dimensions

Shapes = dict[str, tuple[int, ...]]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def is_gain(name: str) -> bool:
    """Whether a tensor is the gain of a norm, by its Hugging Face name."""
    return name.endswith("norm.weight")


@dataclass(frozen=True)
class Site:
    """Linears of a decoder block that read the same input, hence share one Hessian.

    Attributes:
        name: Short name, unique in the block.
        linears: Module names relative to the block.
        producer: Module whose output channels, rescaled, rescale the site's input: a norm, or the
            linear upstream of it (through attention: ``v_proj`` per key/value head).
    """

    name: str
    linears: tuple[str, ...]
    producer: str | None = None

    @property
    def norm(self) -> str | None:
        """The norm that the site reads from directly, if it does."""
        return self.producer if self.producer and self.producer.endswith("layernorm") else None


SITES = (
    Site(
        "qkv",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        producer="input_layernorm",
    ),
    Site("o", ("self_attn.o_proj",), producer="self_attn.v_proj"),
    Site("gate_up", ("mlp.gate_proj", "mlp.up_proj"), producer="post_attention_layernorm"),
    Site("down", ("mlp.down_proj",), producer="mlp.up_proj"),
)


@dataclass(frozen=True)
class Architecture:
    """A family of pre-norm decoders with RMSNorm, RoPE, (grouped) attention and SwiGLU.

    Attributes:
        model_type: ``model_type`` in config.json.
        class_prefix: What the transformers classes begin with (``Llama`` of ``LlamaForCausalLM``).
        rope_types: RoPE types that the family's stock runtimes compute.
        sites: Groups of linears in execution order.
        biases: Linears that have a bias: always (True), or where a config flag says so (its name).
        refused_flags: Config flags that change the computation and must be off.
        qk_norm: Queries and keys go through an RMSNorm of their own, per head.
        default_head_dim: Head width if the config names none; None means ``hidden / heads``.
    """

    model_type: str
    class_prefix: str
    rope_types: frozenset[str]
    sites: tuple[Site, ...] = SITES
    biases: Mapping[str, bool | str] = field(default_factory=dict, hash=False)
    refused_flags: frozenset[str] = frozenset()
    qk_norm: bool = False
    default_head_dim: int | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block in execution order."""
        return tuple(linear for site in self.sites for linear in site.linears)

    def site_of(self, linear: str) -> Site:
        """The site that a linear (name relative to the block) belongs to."""
        return next(site for site in self.sites if linear in site.linears)

    def block_prefix(self, index: int) -> str:
        """What the names of the tensors of block `index` begin with."""
        return f"model.layers.{index}."

    def dimensions(self, config: Mapping[str, Any]) -> Dimensions:
        """The sizes of a model of this family. Raises InputError if they make no sense."""
        return Dimensions.from_config(config, self.default_head_dim)

    def has_bias(self, config: Mapping[str, Any], linear: str) -> bool:
        """Whether `linear` (name relative to the block) has a bias in a model of this family."""
        rule = self.biases.get(linear, False)
        return bool(config.get(rule, False)) if isinstance(rule, str) else rule

    def qkv_bias(self, config: Mapping[str, Any]) -> bool:
        """Whether the query, key and value projections have biases."""
        return self.has_bias(config, "self_attn.q_proj")

    def block_tensors(self, config: Mapping[str, Any]) -> Shapes:
        """Names relative to the block, and shapes (linears ``[out, in]``), in execution order."""
        size = self.dimensions(config)
        queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
        widths = {
            "self_attn.q_proj": (queries, size.hidden),
            "self_attn.k_proj": (keys, size.hidden),
            "self_attn.v_proj": (keys, size.hidden),
            "self_attn.o_proj": (size.hidden, queries),
            "mlp.gate_proj": (size.intermediate, size.hidden),
            "mlp.up_proj": (size.intermediate, size.hidden),
            "mlp.down_proj": (size.hidden, size.intermediate),
        }
        shapes: Shapes = {}
        for site in self.sites:
            if site.norm:
                shapes[f"{site.norm}.weight"] = (size.hidden,)
            for linear in site.linears:
                shapes[f"{linear}.weight"] = widths[linear]
                if self.has_bias(config, linear):
                    shapes[f"{linear}.bias"] = widths[linear][:1]
            if site.name == "qkv" and self.qk_norm:
                shapes["self_attn.q_norm.weight"] = (size.head_dim,)
                shapes["self_attn.k_norm.weight"] = (size.head_dim,)
        return shapes

    def tensors(self, config: Mapping[str, Any]) -> Shapes:
        """Every tensor of a checkpoint: Hugging Face name and shape, without a tied head."""
        size = self.dimensions(config)
        shapes: Shapes = {EMBEDDING: (size.vocab, size.hidden)}
        block = self.block_tensors(config)
        for index in range(size.layers):
            prefix = self.block_prefix(index)
            shapes.update({prefix + name: shape for name, shape in block.items()})
        shapes[FINAL_NORM] = (size.hidden,)
        if not config.get("tie_word_embeddings", False):
            shapes[HEAD] = (size.vocab, size.hidden)
        return shapes

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses a model of this family that would not be computed faithfully.

        Raises:
            InputError: The config is malformed.
            UnsupportedError: Names the setting that is not supported.
        """
        self.dimensions(config)
        check_config(config, f"{self.class_prefix}ForCausalLM", self.rope_types, self.refused_flags)
