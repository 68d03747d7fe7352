"""Whether the output head is the embedding: decided by the weights, not by a flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.checkpoint.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 22


def find_tie(weights: Weights, flag: bool) -> tuple[bool, str | None]:
    """Whether head and embedding are one tensor, and a note if the config says otherwise.

    The head is tied if the checkpoint has none, or one that is byte-identical to the embedding.
    Different tensors stay separate even if the config wants them tied, as in transformers 5.

    Args:
        weights: Where the tensors are.
        flag: ``tie_word_embeddings`` of the config.
    """
    if HEAD not in weights.tensors:
        note = f"config.json says the head is not tied, but there is no {HEAD}: tied"
        return True, None if flag else note
    if _identical(weights):
        note = f"{HEAD} is byte-identical to the embedding: stored once, as a tied head"
        return True, None if flag else note
    note = f"config.json says the head is tied, but {HEAD} differs from the embedding: kept apart"
    return False, note if flag else None


def _identical(weights: Weights) -> bool:
    head, embedding = weights.tensors[HEAD], weights.tensors.get(EMBEDDING)
    if embedding is None or (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    left, right = (_bytes(weights.loaders[name]()) for name in (HEAD, EMBEDDING))
    # Chunk by chunk: untied heads differ in the first, and only that much is read.
    return all(
        bool((a == b).all())
        for a, b in zip(left.split(CHUNK_BYTES), right.split(CHUNK_BYTES), strict=True)
    )


def _bytes(tensor: Tensor) -> Tensor:
    import torch

    return tensor.reshape(-1).view(torch.uint8)
