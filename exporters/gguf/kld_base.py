"""Reference logits in the format of ``llama-perplexity --kl-divergence-base``.

With this file stock llama-perplexity measures a GGUF file against the full precision model of
PyTorch. Layout (tools/perplexity of llama.cpp): ``_logits_``, then context, vocabulary and number
of chunks as int32, all tokens as int32, then for every scored position one row of uint16: two
float32 (step and smallest log-probability) and the log-probabilities as multiples of the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipeline.errors import ResourceError

RANGE = 16.0
"""Log-probabilities further below the largest one are clipped (nats)."""


def write_kld_base(path: Path, tokens: np.ndarray, logits: Iterable[np.ndarray]) -> None:
    """Write the logits of all chunks of a text.

    Args:
        path: File to write.
        tokens: int32 [chunks, context].
        logits: For each chunk float32 [context - first, vocabulary] from position
            ``first = context // 2`` on; the last position predicts nothing and is left out.

    Raises:
        ResourceError: The file cannot be written.
        ValueError: Not one array of logits a chunk.
    """
    chunks, context = tokens.shape
    scored = context - 1 - context // 2
    try:
        with path.open("wb") as file:
            written = 0
            for rows in logits:
                if written == 0:
                    file.write(b"_logits_")
                    file.write(np.array([context, rows.shape[1], chunks], "<i4").tobytes())
                    file.write(np.ascontiguousarray(tokens, "<i4").tobytes())
                file.write(encode_rows(rows[:scored]).tobytes())
                written += 1
    except OSError as error:
        raise ResourceError(
            f"cannot write the reference logits {path}", why=str(error), fix="free disk space"
        ) from error
    if written != chunks:
        raise ValueError(f"logits of {written} chunks for {chunks} chunks of tokens")


def encode_rows(logits: np.ndarray) -> np.ndarray:
    """float32 [rows, vocabulary] -> uint16 [rows, 4 + vocabulary rounded up to even]."""
    rows, vocabulary = logits.shape
    wide = logits.astype(np.float32)
    top = wide.max(1, keepdims=True)
    low = np.maximum(wide.min(1, keepdims=True), top - np.float32(RANGE))
    total = np.log(np.exp((wide - top).astype(np.float64)).sum(1, keepdims=True))
    step = (top - low) / np.float32(65535)
    smallest = (low - top - total).astype(np.float32)
    codes = np.rint((wide - low) / np.where(step > 0, step, 1)).clip(0, 65535)
    out = np.zeros((rows, 4 + (vocabulary + 1) // 2 * 2), "<u2")
    out[:, :4] = np.hstack([step.astype("<f4"), smallest.astype("<f4")]).view("<u2")
    out[:, 4 : 4 + vocabulary] = np.where(step > 0, codes, 0)
    return out
