"""Comparison of two runs of a runtime."""

from collections.abc import Iterable

from torch import Tensor

from runtimes.metrics import Comparison, ComparisonAccumulator


def compare(
    reference: Iterable[Tensor], candidate: Iterable[Tensor], tokens: Tensor, first: int
) -> Comparison:
    """Of two streams from `Runtime.logits(tokens, first)`, one window in memory at a time."""
    accumulator = ComparisonAccumulator(tokens_per_window=tokens.shape[1] - 1 - first)
    for left, right, row in zip(reference, candidate, tokens, strict=True):
        accumulator.update(left, right, row[first + 1 :])
    return accumulator.result()
