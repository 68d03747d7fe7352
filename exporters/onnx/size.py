"""The numbers of a config.json that shape the decoder's graph, and the tensors it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exporters.config_fields import Config, head_dim, integer, number
from exporters.onnx.names import EMBEDDING, HEAD
from pipeline.errors import InputError, UnsupportedError

FAMILIES = ("llama", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Position embeddings whose frequencies do not depend on the length of the text."""

_EPSILON = 1e-6  # transformers' default for all three families


@dataclass(frozen=True)
class DecoderSize:
    """Sizes of a decoder with RMSNorm, rotary embedding, (grouped) attention and SwiGLU.

    Attributes:
        vocabulary: Rows of the embedding.
        hidden: Width of the residual stream.
        intermediate: Width inside the MLP.
        layers: Decoder blocks.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of a head.
        epsilon: Of every RMSNorm.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float

    @classmethod
    def of(cls, config: Config) -> DecoderSize:
        """Sizes in a config.json.

        Raises:
            InputError: A size is missing or makes no sense.
            UnsupportedError: Another family, or a setting that the graph does not compute.
        """
        _check(config)
        heads = integer(config, "num_attention_heads")
        kv_heads = integer(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError(f"config.json: {heads} heads do not divide into {kv_heads} groups")
        return cls(
            vocabulary=integer(config, "vocab_size"),
            hidden=integer(config, "hidden_size"),
            intermediate=integer(config, "intermediate_size"),
            layers=integer(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim(config),
            epsilon=number(config, "rms_norm_eps", _EPSILON),
        )


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: position p turns pair i by ``p * frequencies[i]``.

    Attributes:
        frequencies: float32 values, head_dim / 2 of them.
        magnitude: Factor of every cosine and sine (YaRN's, arXiv 2309.00071); else 1.
    """

    frequencies: Sequence[float]
    magnitude: float = 1.0


def check_rotary(rotary: Rotary, size: DecoderSize) -> None:
    """Refuses frequencies that do not belong to the decoder.

    Raises:
        InputError: Not one frequency a pair, or not finite.
    """
    if len(rotary.frequencies) * 2 != size.head_dim:
        raise InputError(
            f"{len(rotary.frequencies)} rotary frequencies for heads of {size.head_dim}"
        )
    if not all(map(math.isfinite, (*rotary.frequencies, rotary.magnitude))):
        raise InputError("a rotary frequency is not finite")


def check_tensors(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a model of which a tensor is missing, misshapen, or has no place in the graph.

    Args:
        config: Content of the Hugging Face config.json.
        shapes: Of all its tensors by Hugging Face name, as in the checkpoint.

    Raises:
        InputError: A tensor is missing or has another shape.
        UnsupportedError: The graph has no place for a tensor.
    """
    needed, optional = _expected(config)
    missing = sorted(needed.keys() - shapes.keys())
    if missing:
        raise InputError(f"tensor {missing[0]} is missing", why=f"{len(missing)} are")
    odd = sorted(shapes.keys() - needed.keys() - optional.keys())
    if odd:
        raise UnsupportedError(
            f"the ONNX graph has no place for {odd[0]!r}",
            why=f"it is not part of a dense {config['model_type']} decoder with this config",
        )
    for name, expected in (optional | needed).items():
        if shapes.get(name, expected) != expected:
            raise InputError(f"tensor {name} is {shapes[name]}, its config makes it {expected}")


Shapes = dict[str, tuple[int, ...]]


def _expected(config: Config) -> tuple[Shapes, Shapes]:
    """Shapes of the tensors that must be there, and of those that may be."""
    size, family = DecoderSize.of(config), config["model_type"]
    queries, keys = size.heads * size.head_dim, size.kv_heads * size.head_dim
    linears = {
        "self_attn.q_proj": (queries, size.hidden),
        "self_attn.k_proj": (keys, size.hidden),
        "self_attn.v_proj": (keys, size.hidden),
        "self_attn.o_proj": (size.hidden, queries),
        "mlp.gate_proj": (size.intermediate, size.hidden),
        "mlp.up_proj": (size.intermediate, size.hidden),
        "mlp.down_proj": (size.hidden, size.intermediate),
    }
    norms = {"input_layernorm": size.hidden, "post_attention_layernorm": size.hidden}
    if family == "qwen3":
        norms |= {"self_attn.q_norm": size.head_dim, "self_attn.k_norm": size.head_dim}
    table = (size.vocabulary, size.hidden)
    needed: Shapes = {EMBEDDING: table, "model.norm.weight": (size.hidden,)}
    optional: Shapes = {}
    (optional if config.get("tie_word_embeddings", False) else needed)[HEAD] = table
    for prefix in (f"model.layers.{index}" for index in range(size.layers)):
        needed |= {f"{prefix}.{name}.weight": (width,) for name, width in norms.items()}
        needed |= {f"{prefix}.{name}.weight": shape for name, shape in linears.items()}
        biased = [name for name in linears if _has_bias(config, name)]
        needed |= {f"{prefix}.{name}.bias": linears[name][:1] for name in biased}
    return needed, optional


def _has_bias(config: Config, linear: str) -> bool:
    """Whether transformers gives a linear a bias."""
    family, (part, name) = config["model_type"], linear.split(".")
    if part == "mlp":
        return family == "llama" and bool(config.get("mlp_bias"))
    if family == "qwen2":
        return name != "o_proj"
    return bool(config.get("attention_bias"))


def _check(config: Config) -> None:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedError(
            f"no ONNX graph for architecture {family!r}", fix=f"known: {', '.join(FAMILIES)}"
        )
    kinds = config.get("layer_types") or []
    if config.get("use_sliding_window") or any(kind != "full_attention" for kind in kinds):
        raise UnsupportedError("sliding-window attention", why="the graph computes full attention")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"activation {activation!r}", why="the graph computes SwiGLU")
    if head_dim(config) % 2:
        raise InputError(f"config.json: head_dim {head_dim(config)}, which does not form pairs")
    _check_rope(config)


def _check_rope(config: Config) -> None:
    """Refuses what one table of frequencies cannot express; transformers 4 and 5 differ in keys."""
    for section in ("rope_scaling", "rope_parameters"):
        found = config.get(section) or {}
        if not isinstance(found, Mapping):
            raise InputError(f"config.json: {section} is {found!r}", why="it must be an object")
        kind = found.get("rope_type") or found.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise UnsupportedError(
                f"RoPE type {kind!r}",
                why="its frequencies depend on the length of the text, those of the graph do not",
                fix=f"supported: {', '.join(ROPE_TYPES)}",
            )
        partial = found.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise UnsupportedError(
                f"partial_rotary_factor {partial!r}", why="the graph rotates whole heads"
            )
