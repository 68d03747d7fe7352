"""Open the checkpoint and decide what will be stored how, before any expensive work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exporters.gguf import Vocabulary, check_writable, gguf_name, read_vocabulary
from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.calibration.text import STDLIB
from pipeline.checkpoint import Checkpoint, hf_config, load_tokenizer, open_checkpoint
from pipeline.demo import MODEL as DEMO
from pipeline.errors import UnsupportedError
from pipeline.quantization.formats import get_format
from pipeline.recipe import Recipe
from pipeline.stages.stored import FLOAT_TYPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

REPLACEMENTS = {
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What llama-quantize takes where a width does not divide into a type's blocks; F16 otherwise."""

DEMO_NAME = "demo-llama-4m"

DEFAULT_TEXT = "wikitext2"
"""Calibration text of models other than the demo."""


@dataclass(frozen=True)
class TypePlan:
    """The type that each weight matrix is stored in.

    Attributes:
        types: ggml type by Hugging Face name; tensors that are not named stay F32.
        replaced: Matrices whose type was replaced, as ``name: wanted -> taken (width)``.
    """

    types: dict[str, str]
    replaced: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint, ready to be quantized.

    Attributes:
        checkpoint: The files.
        config: Its transformers configuration.
        tokenizer: Its fast tokenizer.
        vocabulary: The tokenizer in llama.cpp's terms.
        plan: The type of each matrix.
        calibration: Name of the calibration text.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    vocabulary: Vocabulary
    plan: TypePlan
    calibration: str

    @property
    def head(self) -> str:
        """Name of the output matrix: the embedding's where they are tied."""
        return HEAD if HEAD in self.plan.types else EMBEDDING

    @property
    def name(self) -> str:
        """Name of the model for files and people: the last part of its path or hub id."""
        folder = Path(self.checkpoint.source)
        if folder.is_dir():
            folder = folder.resolve()
        return DEMO_NAME if folder == DEMO else folder.name

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the manifest says about the input; hashes every file."""
        checkpoint = self.checkpoint
        return {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "architecture": checkpoint.architecture.model_type,
            "parameters": checkpoint.num_parameters,
            "tied": checkpoint.tied,
            "files": checkpoint.fingerprint(),
        }

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor to write, by Hugging Face name; a head of its own type included."""
        shapes = dict(self.checkpoint.shapes)
        if HEAD in self.plan.types:
            shapes.setdefault(HEAD, shapes[EMBEDDING])
        return shapes

    @property
    def main_type(self) -> str:
        """The type that holds most decoder weights: the recipe's, unless it was replaced."""
        held: Counter[str] = Counter()
        for name, kind in self.plan.types.items():
            if name not in (EMBEDDING, HEAD):
                held[kind] += prod(self.shapes[name])
        return held.most_common(1)[0][0]

    def read(self, name: str) -> torch.Tensor:
        """A float weight, float32; a tied head reads the embedding."""
        if name == HEAD and self.checkpoint.tied:
            name = EMBEDDING
        return self.checkpoint.read(name, torch.float32)


def open_source(recipe: Recipe, *, allow_pickle: bool) -> Source:
    """Open and check everything that can be checked without reading weights.

    Raises:
        InputError: The checkpoint is missing, damaged or incomplete.
        UnsupportedError: Its architecture, tokenizer or widths cannot be represented.
    """
    checkpoint = open_checkpoint(
        DEMO if recipe.model is None else recipe.model,
        revision=recipe.revision,
        allow_pickle=allow_pickle,
    )
    tokenizer = load_tokenizer(checkpoint)
    vocabulary = read_vocabulary(tokenizer, checkpoint.config)
    default_text = STDLIB if recipe.model is None else DEFAULT_TEXT
    source = Source(
        checkpoint=checkpoint,
        config=hf_config(checkpoint),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        plan=plan_types(checkpoint, recipe),
        calibration=recipe.calibration.source or default_text,
    )
    names = [gguf_name(name) for name in source.shapes]
    check_writable(checkpoint.config, vocabulary, names, source.name)
    return source


def plan_types(checkpoint: Checkpoint, recipe: Recipe) -> TypePlan:
    """Type of every matrix, replaced where a width does not divide.

    Raises:
        UnsupportedError: A type would have to be replaced and the recipe does not allow it.
    """
    wanted = {EMBEDDING: recipe.token_embedding_type}
    if recipe.output_tensor_type is not None and (
        not checkpoint.tied or recipe.output_tensor_type != recipe.token_embedding_type
    ):
        wanted[HEAD] = recipe.output_tensor_type
    elif not checkpoint.tied:
        wanted[HEAD] = recipe.token_embedding_type
    config = checkpoint.config
    for index in range(checkpoint.architecture.dimensions(config).layers):
        prefix = checkpoint.architecture.block_prefix(index)
        for linear in checkpoint.architecture.linears:
            wanted[f"{prefix}{linear}.weight"] = recipe.type
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
    return TypePlan(types, tuple(replaced))


def _fitting(kind: str, width: int) -> str:
    while kind not in FLOAT_TYPES and not get_format(kind).fits(width):
        kind = REPLACEMENTS.get(kind, "F16")
    return kind
