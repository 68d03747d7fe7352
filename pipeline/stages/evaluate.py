"""Run several models in lockstep on the same windows and compare them pairwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import VerificationError
from pipeline.progress import Progress
from runtimes.base import check_windows
from runtimes.metrics import Comparison, ComparisonAccumulator, Protocol

Logits = Callable[[Tensor, int], Iterator[Tensor]]
"""``logits(tokens [windows, context], first)``, see `runtimes.base.Runtime.logits`."""

Pair = tuple[str, str]
"""Names of a reference and a candidate."""


@torch.inference_mode()
def evaluate(
    models: Mapping[str, Logits],
    pairs: Sequence[Pair],
    tokens: Tensor,
    protocol: Protocol,
    progress: Progress,
) -> dict[Pair, Comparison]:
    """Compare pairs of models; every model runs once, one window of logits each in memory.

    Args:
        models: Models by name.
        pairs: What to compare; the first of a pair is the reference. Pairs of models that are not
            there are left out.
        tokens: Evaluation windows, int64 [windows, context].
        protocol: Which positions count.
        progress: A block is a model.

    Raises:
        VerificationError: A model yields another number of windows, or logits that are not finite.
    """
    check_windows(tokens, protocol.first)
    present = [pair for pair in pairs if set(pair) <= set(models)]
    used = [name for name in models if any(name in pair for pair in present)]
    streams = {name: models[name](tokens, protocol.first) for name in used}
    found = {pair: ComparisonAccumulator(protocol.scored) for pair in present}
    for n, row in enumerate(tokens):
        logits: dict[str, Tensor] = {}
        for i, (name, stream) in enumerate(streams.items()):
            if n == 0:  # the first window costs a model nearly as much as all of them
                progress.block(i + 1, len(used))
            window = next(stream, None)
            if window is None:
                raise VerificationError(f"{name} stopped before the last evaluation window")
            logits[name] = window
        for (reference, candidate), accumulator in found.items():
            accumulator.update(logits[reference], logits[candidate], row[protocol.first + 1 :])
    for name, stream in streams.items():
        if next(stream, None) is not None:
            raise VerificationError(f"{name} goes on after the last evaluation window")
    return {pair: accumulator.result() for pair, accumulator in found.items()}
