"""What a runtime is."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from pipeline.errors import InputError


@runtime_checkable
class Runtime(Protocol):
    """An engine with a loaded model: token ids in, logits out.

    A context manager: leaving it closes the runtime.
    """

    @property
    def name(self) -> str:
        """What reports and error messages call it."""
        ...

    def logits(self, tokens: Tensor, first: int) -> Iterator[Tensor]:
        """Evaluates windows independently of each other, one after the other.

        Args:
            tokens: int64 [windows, context].
            first: First position whose logits are wanted.

        Yields:
            For each window, in order, float32 [context - 1 - first, vocabulary]: the logits at
            positions first .. context - 2, which predict tokens first + 1 .. context - 1.
        """
        ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model puts around it."""
        ...

    def close(self) -> None:
        """Frees the model; safe to call twice."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_windows(tokens: Tensor, first: int) -> None:
    """Rejects what `Runtime.logits` cannot evaluate.

    Raises:
        InputError: `tokens` is not int64 [windows, context], holds a negative id, or no position
            is left to score.
    """
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise InputError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}",
            why="windows are int64 [windows, context]",
            fix="cut the text with runtimes.metrics.windows",
        )
    if not 0 <= first <= tokens.shape[1] - 2:
        raise InputError(
            "nothing to score",
            why=f"first position {first} in windows of {tokens.shape[1]} tokens",
            fix="use longer windows",
        )
    if tokens.numel() and tokens.min() < 0:
        raise InputError(f"negative token id {tokens.min().item()}")
