"""Hugging Face checkpoints, read strictly and one tensor at a time."""

from __future__ import annotations

from pipeline.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoint.huggingface import hf_config, load_tokenizer
from pipeline.checkpoint.packed import MIDDLE, PackedMatrix

__all__ = [
    "MIDDLE",
    "Checkpoint",
    "PackedMatrix",
    "hf_config",
    "load_tokenizer",
    "open_checkpoint",
]
