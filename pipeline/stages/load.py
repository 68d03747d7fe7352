"""Open the checkpoint and decide what will be stored how, before any expensive work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from exporters.gguf import Vocabulary, check_writable, gguf_name, read_vocabulary
from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.calibration.text import STDLIB
from pipeline.checkpoint import Checkpoint, hf_config, load_tokenizer, open_checkpoint
from pipeline.demo import MODEL as DEMO
from pipeline.mixes import ALIASES, base_type
from pipeline.recipe import Recipe
from pipeline.report import Gate
from pipeline.stages.plan import TypePlan, plan_types
from pipeline.stages.untie import prepare_for_biases, prepare_for_transforms
from pipeline.transforms.changes import Change, changed, run_time_rotation
from pipeline.transforms.operators import Rotation

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

DEMO_NAME = "demo-llama-4m"

DEFAULT_TEXT = "wikitext2"
"""Calibration text of models other than the demo."""


@dataclass(frozen=True)
class Source:
    """A checkpoint, ready to be quantized.

    Attributes:
        checkpoint: The files.
        config: Its transformers configuration.
        tokenizer: Its fast tokenizer.
        gguf_vocabulary: The tokenizer in llama.cpp's terms; None without a GGUF file to write.
        plan: The type of each matrix.
        calibration: Name of the calibration text.
        file_type: What the file announces itself as: the mix or type asked for, or the type that
            holds most weights if that was replaced.
        changes: What transforms did to the checkpoint's weights; `read` has them applied.
        exactness: Gates on those changes.
        rewrite_notes: What transforms left out of what was asked, and what they found.
        bounds: How far outliers can reach after block rotations, before and after permutations.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    gguf_vocabulary: Vocabulary | None
    plan: TypePlan
    calibration: str
    file_type: str
    changes: tuple[Change, ...] = ()
    exactness: tuple[Gate, ...] = ()
    rewrite_notes: tuple[str, ...] = ()
    bounds: tuple[dict[str, Any], ...] = ()
    tuned: bool = False

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

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer in llama.cpp's terms. Raises ValueError if there is no GGUF target."""
        if self.gguf_vocabulary is None:
            raise ValueError("no GGUF file is to be written")
        return self.gguf_vocabulary

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the checkpoint and its tokenizer."""
        vocabulary = self.gguf_vocabulary
        return (*self.checkpoint.notes, *(vocabulary.notes if vocabulary else ()))

    @property
    def packed_by(self) -> str | None:
        """The method of a checkpoint that is 4-bit already."""
        return next((m.scheme.method for m in self.checkpoint.packed.values()), None)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What the manifest says about the input; hashes every file."""
        checkpoint = self.checkpoint
        return {
            "source": checkpoint.source,
            "revision": checkpoint.revision,
            "architecture": checkpoint.architecture.model_type,
            "parameters": checkpoint.num_parameters,
            "tied": checkpoint.tied or HEAD in checkpoint.added,
            "files": checkpoint.fingerprint(),
            **({"packed": self.packed_by} if self.packed_by else {}),
        }

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor to write, by Hugging Face name; a head of its own type included."""
        shapes = dict(self.checkpoint.shapes)
        if HEAD in self.plan.types:
            shapes.setdefault(HEAD, shapes[EMBEDDING])
        return shapes

    def read(self, name: str) -> torch.Tensor:
        """A float weight after all transforms, float32; a tied head reads the embedding."""
        return self.exact(name).float() if self.changes else self.original(name)

    @property
    def online(self) -> Rotation | None:
        """What the graph does to the input of every down_proj at run time, if anything."""
        return run_time_rotation(self.changes)

    @property
    def inner(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """The same as a function, for `runtimes.torch_reference.TorchReference`."""
        rotation = self.online
        return None if rotation is None else rotation.apply

    def exact(self, name: str) -> torch.Tensor:
        """The same in float64: transforms are computed in it, one tensor at a time."""
        if name == HEAD and self.checkpoint.tied:
            name = EMBEDDING
        return changed(self._original64, self.changes)(name).contiguous()

    def original(self, name: str) -> torch.Tensor:
        """A float weight as the checkpoint has it, float32; a tied head reads the embedding."""
        if name == HEAD and self.checkpoint.tied:
            name = EMBEDDING
        return self.checkpoint.read(name, torch.float32)

    def _original64(self, name: str) -> torch.Tensor:
        return self.original(name).double()


def open_source(recipe: Recipe, *, allow_pickle: bool) -> Source:
    """Open and check everything that can be checked without reading weights (of checkpoints that
    are 4-bit already, zero points and orders are read).

    Raises:
        InputError: The checkpoint is missing, damaged or incomplete.
        UnsupportedError: Its architecture, tokenizer or widths cannot be represented.
    """
    checkpoint = open_checkpoint(
        DEMO if recipe.model is None else recipe.model,
        revision=recipe.revision,
        allow_pickle=allow_pickle,
    )
    checkpoint = prepare_for_biases(prepare_for_transforms(checkpoint, recipe), recipe)
    tokenizer = load_tokenizer(checkpoint)
    gguf = "gguf" in recipe.targets
    vocabulary = read_vocabulary(tokenizer, checkpoint.config) if gguf else None
    default_text = STDLIB if recipe.model is None else DEFAULT_TEXT
    plan = plan_types(checkpoint, recipe)
    source = Source(
        checkpoint=checkpoint,
        config=hf_config(checkpoint),
        tokenizer=tokenizer,
        gguf_vocabulary=vocabulary,
        plan=plan,
        calibration=recipe.calibration.source or default_text,
        file_type=_file_type(plan.most(checkpoint.shapes), recipe),
    )
    names = [gguf_name(name) for name in source.shapes]
    if vocabulary is not None:
        check_writable(checkpoint.config, vocabulary, names, source.name)
    return source


def _file_type(most: str, recipe: Recipe) -> str:
    if most != base_type(recipe.weight_type):
        return most
    return most if recipe.pure else ALIASES.get(recipe.weight_type, recipe.weight_type)
