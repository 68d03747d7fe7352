"""The type that each weight matrix is stored in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from exporters.gguf import gguf_name, row_bytes, why_unscaled
from exporters.onnx.integers import stored_bytes
from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.checkpoint import MIDDLE, Checkpoint, PackedMatrix
from pipeline.errors import UnsupportedError, UsageError
from pipeline.mixes import Matrix, base_type, embedding_type, head_type, mix_type, pure_type
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import check_rounding
from pipeline.recipe import Recipe, split_tensor_type
from pipeline.stages.stored import FLOAT_TYPES
from pipeline.targets import is_onnx_type, smaller_group

REPLACEMENTS = {
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **dict.fromkeys(("IQ4_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "IQ4_NL"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "NVFP4": "IQ4_NL",
}
"""What llama-quantize takes where a width does not divide into a type's blocks; F16 otherwise. It
does not write NVFP4, whose replacement has as many bits."""


ONNX_TABLES = ("F16", "Q8_0")
"""Embedding and head of ONNX files: rows that are gathered, and a product with 8 bits; a table that
is both has the second type."""

REPACKED, REPACKED_BLOCK = ("Q4_0", "Q4_1"), 32
"""Types that hold the integers and scales of others' 4-bit checkpoints."""


@dataclass(frozen=True)
class TypePlan:
    """The type that each weight matrix is stored in.

    Attributes:
        types: ggml type by Hugging Face name; tensors that are not named stay F32.
        replaced: Matrices whose type was replaced, as ``name: wanted -> taken (width)``.
    """

    types: dict[str, str]
    replaced: tuple[str, ...]

    def size_bytes(self, shapes: Mapping[str, tuple[int, ...]], *, packed: bool = False) -> int:
        """Bytes of all matrices' data, without metadata, padding and scales of whole tensors; with
        `packed`, 3 bits of ONNX take no container of 4."""
        return sum(
            _stored_bytes(self.types.get(name, "F32"), shape, name, packed)
            for name, shape in shapes.items()
        )

    def most(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The type that holds most decoder weights."""
        held: Counter[str] = Counter()
        for name, kind in self.types.items():
            if name not in (EMBEDDING, HEAD):
                held[kind] += prod(shapes[name])
        return held.most_common(1)[0][0]


def plan_types(checkpoint: Checkpoint, recipe: Recipe) -> TypePlan:
    """Type of every matrix, replaced where a width does not divide.

    Raises:
        UnsupportedError: A type would have to be replaced and the recipe does not allow it.
        UsageError: A pattern of the recipe's tensor types fits no tensor, or a type is asked for
            that would quantize a matrix of the checkpoint a second time.
    """
    wanted = {**_tables(checkpoint, recipe), **_linears(checkpoint, recipe)}
    _override(wanted, recipe)
    _keep_packed(wanted, checkpoint, recipe)
    types, replaced = {}, []
    for name, kind in wanted.items():
        width = checkpoint.shape(EMBEDDING if name == HEAD else name)[1]
        types[name] = _fitting(kind, width)
        if types[name] != kind:
            replaced.append(f"{name}: {kind} -> {types[name]} (width {width})")
    if replaced and not recipe.allow_fallback:
        raise UnsupportedError(
            f"{len(replaced)} matrices cannot be stored in the type that was asked for",
            why=f"their widths do not divide into its blocks; first: {replaced[0]}",
            fix="choose a type with smaller blocks, or add --allow-fallback to accept this",
        )
    _check_rounding(types, recipe)
    _check_tensor_scales(types, checkpoint)
    return TypePlan(types, tuple(replaced))


def _check_rounding(types: Mapping[str, str], recipe: Recipe) -> None:
    """Refuse what `quantize_layer` would refuse, before any work."""
    if recipe.imatrix is not None:
        return
    for name, kind in types.items():
        if name != EMBEDDING and kind not in FLOAT_TYPES:  # an embedding is rounded to nearest
            check_rounding(get_format(kind), recipe.quantization.rounding)


def _check_tensor_scales(types: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Refuse a type with a scale of the whole tensor where llama.cpp does not multiply by it.

    Without that scale, NVFP4's groups have those of E4M3 as they are, which for weights of a
    standard deviation of 0.02 is 20 % more squared error, of 0.01 50 %, of 0.002 more than 200 %
    (scales by PiSO).
    """
    for name, kind in types.items():
        if kind in FLOAT_TYPES or get_format(kind).tensor_scale is None:
            continue
        biased = f"{name.removesuffix('weight')}bias" in checkpoint.shapes
        reason = why_unscaled(checkpoint.config, gguf_name(name), biased=biased)
        if reason is not None:
            other = "--token-embedding-type Q8_0" if name == EMBEDDING else "--tensor-type ffn=Q4_0"
            raise UnsupportedError(
                f"{gguf_name(name)} cannot be {kind}",
                why=f"{reason}; {kind} needs a scale of the whole tensor",
                fix=f"give it another type, as with {other}",
            )


def _tables(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, str]:
    """Embedding and head: as asked for, else by the mix's rules."""
    embedding, head = recipe.token_embedding_type, recipe.output_tensor_type
    base = pure_type(recipe.weight_type)
    width = checkpoint.shape(EMBEDDING)[1]
    of_head = base if recipe.pure else head_type(recipe.weight_type, width)
    of_embedding = base if recipe.pure else embedding_type(recipe.weight_type)
    if "onnx" in recipe.targets and not recipe.pure:
        of_embedding, of_head = ONNX_TABLES
    if not checkpoint.tied:
        return {EMBEDDING: embedding or of_embedding, HEAD: head or of_head}
    shared = {EMBEDDING: embedding or head or of_head}
    return shared | ({HEAD: head} if head is not None and head != shared[EMBEDDING] else {})


def _linears(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, str]:
    dimensions = checkpoint.architecture.dimensions(checkpoint.config)
    wanted = {}
    for index in range(dimensions.layers):
        prefix = checkpoint.architecture.block_prefix(index)
        for linear in checkpoint.architecture.linears:
            name = f"{prefix}{linear}.weight"
            matrix = Matrix(
                gguf_name(name).split(".")[2],
                index,
                dimensions.layers,
                dimensions.heads / dimensions.kv_heads,
            )
            base = pure_type(recipe.weight_type)
            pure = recipe.pure or "onnx" in recipe.targets
            wanted[name] = base if pure else mix_type(recipe.weight_type, matrix)
    return wanted


def _override(wanted: dict[str, str], recipe: Recipe) -> None:
    """Types by pattern of the GGUF name; the first that fits decides."""
    rules = [split_tensor_type(text) for text in recipe.tensor_types]
    used = set()
    for name in wanted:
        for pattern, kind in rules:
            if re.search(pattern, gguf_name(name)):
                wanted[name] = kind
                used.add(pattern)
                break
    idle = [pattern for pattern, _ in rules if pattern not in used]
    if idle:
        raise UsageError(
            f"--tensor-type {idle[0]} decides the type of no tensor",
            why="patterns are searched in GGUF names such as blk.0.ffn_down.weight, in order",
            fix="`python -m pipeline deploy ... --dry-run` prints all names and types",
        )


def _keep_packed(wanted: dict[str, str], checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Types that hold the integers of a checkpoint that is 4-bit already, F16 for the others."""
    if not checkpoint.packed:
        return
    other = recipe.label if base_type(recipe.weight_type) not in REPACKED else None
    if recipe.budgeted:
        other = f"a file of {recipe.label}"
    if other or recipe.tensor_types or "imatrix" in recipe.emit:
        what = other or "--tensor-type or --emit imatrix"
        raise UsageError(
            f"the checkpoint is 4-bit already and is repacked as it is: {what} cannot be had",
            why="that would quantize it a second time, or needs calibration",
            fix="leave the type out (Q4_0 or Q4_1 follows), or give the original checkpoint",
        )
    for name in wanted:
        matrix = checkpoint.packed.get(name)
        if matrix is not None:
            wanted[name] = repacked_type(matrix)
        elif name not in (EMBEDDING, HEAD):
            wanted[name] = "F16"


def repacked_type(matrix: PackedMatrix) -> str:
    """Q4_0 if all zero points are in the middle, else Q4_1.

    Raises:
        UnsupportedError: Groups are scattered, or cut through blocks.
    """
    matrix.check_order()
    if matrix.group % REPACKED_BLOCK:
        raise UnsupportedError(
            f"{matrix.name}: groups of {matrix.group} cannot be repacked",
            why=f"ggml's blocks are {REPACKED_BLOCK} inputs with one scale",
            fix="give the original full-precision checkpoint",
        )
    return "Q4_0" if (matrix.zeros() == MIDDLE).all() else "Q4_1"


def _fitting(kind: str, width: int) -> str:
    while kind not in FLOAT_TYPES and not get_format(kind).fits(width):
        kind = REPLACEMENTS.get(kind) or smaller_group(kind) or "F16"
    return kind


def _stored_bytes(kind: str, shape: tuple[int, ...], name: str, packed: bool) -> int:
    if is_onnx_type(kind):  # the types that both targets hold are equally large in both
        return stored_bytes(get_format(kind), shape, name, packed=packed)
    return prod(shape[:-1]) * row_bytes(kind, shape[-1])
