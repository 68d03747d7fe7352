"""The decoder of llama, qwen2 and qwen3 as an ONNX graph.

Names of inputs and outputs are those that Optimum's ORTModelForCausalLM, onnxruntime-genai and
transformers.js look for. A cache of length 0 is legal, so that one graph serves prompts, single
tokens and perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from exporters.config_fields import Config
from exporters.onnx.attention import ATTENTIONS, AttentionKind, Inputs, StandardAttention
from exporters.onnx.entries import WeightEntry
from exporters.onnx.graph_builder import GraphBuilder
from exporters.onnx.names import EMBEDDING, HEAD
from exporters.onnx.rotation import BlockRotation, KroneckerPair
from exporters.onnx.size import DecoderSize, Rotary, check_rotary, check_tensors
from exporters.onnx.weights import Weights
from pipeline.errors import InputError

IR_VERSIONS = {21: 10, 23: 11, 25: 13}
"""IR version by opset. ONNX Runtime refuses newer ones, and onnx stamps its newest unasked."""

OPSET_AT_2_BITS = 25
"""First opset whose DequantizeLinear takes INT2.

ONNX Runtime 1.32 then replaces the standard Attention by the plain operators that define it: same
numbers, more nodes.
"""


def decoder_model(
    config: Config,
    entries: Sequence[WeightEntry],
    rotary: Rotary,
    attention: AttentionKind,
    inner_rotation: KroneckerPair | None = None,
) -> ir.Model:
    """The model; weights are read when it is saved.

    Args:
        config: Content of the Hugging Face config.json.
        entries: All tensors of the model.
        rotary: Its position embedding.
        attention: Operators to use, see `exporters.onnx.attention`.
        inner_rotation: What the input of every down_proj is rotated by, see
            `exporters.onnx.rotation`; None is nothing.

    Raises:
        InputError: A tensor is missing, or the config makes no sense.
        UnsupportedError: ONNX or ONNX Runtime cannot hold or compute it.
    """
    shapes = {entry.name: entry.shape for entry in entries}
    if len(shapes) < len(entries):
        raise InputError("a tensor is listed twice")
    check_tensors(config, shapes)
    size = DecoderSize.of(config)
    check_rotary(rotary, size)
    build = GraphBuilder()
    weights = Weights(build, entries)
    inputs, pasts = _inputs(build, size)
    chosen = ATTENTIONS[attention](build, size, rotary, inputs)
    rotation = None
    if inner_rotation is not None:
        width = shapes["model.layers.0.mlp.down_proj.weight"][1]
        rotation = BlockRotation(build, inner_rotation, width)
    x = weights.embed(inputs.ids)
    for index in range(size.layers):
        x, keys, values = _block(build, weights, chosen, size, x, index, pasts[index], rotation)
        for word, present in (("key", keys), ("value", values)):
            shape: list[str | int] = [*_cache_shape(size, "total_sequence_length")]
            build.output(present, f"present.{index}.{word}", ir.DataType.FLOAT, shape)
    x = chosen.rms_norm(x, weights.vector("model.norm.weight"), "model.norm")
    logits = weights.linear(x, HEAD if HEAD in weights else EMBEDDING)
    build.output(
        logits, "logits", ir.DataType.FLOAT, ["batch_size", "sequence_length", size.vocabulary]
    )
    narrow = any(entry.product_bits == 2 for entry in entries)
    opset = max(chosen.opset, OPSET_AT_2_BITS if narrow else 0)
    stored = [entry.storage for entry in entries]
    nbits = any(storage is not None and storage.float_zeros for storage in stored)
    own = chosen.runtime_operators or nbits
    return build.model(config["model_type"], opset, IR_VERSIONS[opset], own)


def _cache_shape(size: DecoderSize, length: str) -> list[str | int]:
    return ["batch_size", size.kv_heads, length, size.head_dim]


def _inputs(
    build: GraphBuilder, size: DecoderSize
) -> tuple[Inputs, list[tuple[ir.Value, ir.Value]]]:
    """Graph inputs: ids, mask, positions, and the past keys and values of every block."""
    integers = ir.DataType.INT64
    ids = build.input("input_ids", integers, ["batch_size", "sequence_length"])
    mask = build.input("attention_mask", integers, ["batch_size", "total_sequence_length"])
    positions = build.input("position_ids", integers, ["batch_size", "sequence_length"])
    pasts = []
    for index in range(size.layers):
        key, value = (
            build.input(
                f"past_key_values.{index}.{word}",
                ir.DataType.FLOAT,
                _cache_shape(size, "past_sequence_length"),
            )
            for word in ("key", "value")
        )
        pasts.append((key, value))
    return Inputs(mask, positions, ids), pasts


def _block(
    build: GraphBuilder,
    weights: Weights,
    attention: StandardAttention,
    size: DecoderSize,
    x: ir.Value,
    index: int,
    past: tuple[ir.Value, ir.Value],
    rotation: BlockRotation | None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Residual stream after the block, and its keys and values with those of the past."""
    prefix = f"model.layers.{index}"

    def norm(value: ir.Value, name: str) -> ir.Value:
        return attention.rms_norm(
            value, weights.vector(f"{prefix}.{name}.weight"), f"{prefix}.{name}"
        )

    def linear(value: ir.Value, name: str) -> ir.Value:
        return weights.linear(value, f"{prefix}.{name}.weight")

    def per_head(value: ir.Value, heads: int, word: str) -> ir.Value:
        """Norm of queries or keys where the family has one, then the rotation."""
        name = f"self_attn.{word}_norm"
        if f"{prefix}.{name}.weight" in weights:
            split = build.constant([0, 0, heads, size.head_dim], np.int64)
            joined = build.constant([0, 0, heads * size.head_dim], np.int64)
            value = build.op("Reshape", value, split, name=f"{prefix}.{name}.split")
            value = build.op("Reshape", norm(value, name), joined, name=f"{prefix}.{name}.joined")
        return attention.rotate(value, heads, f"{prefix}.self_attn.{word}_rotary")

    h = norm(x, "input_layernorm")
    q = per_head(linear(h, "self_attn.q_proj"), size.heads, "q")
    k = per_head(linear(h, "self_attn.k_proj"), size.kv_heads, "k")
    v = linear(h, "self_attn.v_proj")
    y, keys, values = attention.attend(q, k, v, past, f"{prefix}.self_attn")
    x = build.op("Add", x, linear(y, "self_attn.o_proj"), name=f"{prefix}.after_attention")
    h = norm(x, "post_attention_layernorm")
    gate = linear(h, "mlp.gate_proj")
    gated = build.op(
        "Mul", gate, build.op("Sigmoid", gate, name=f"{prefix}.mlp"), name=f"{prefix}.mlp.silu"
    )
    inner = build.op("Mul", gated, linear(h, "mlp.up_proj"), name=f"{prefix}.mlp.inner")
    if rotation is not None:
        inner = rotation(inner, f"{prefix}.mlp.rotated")
    x = build.op("Add", x, linear(inner, "mlp.down_proj"), name=f"{prefix}.after_mlp")
    return x, keys, values
