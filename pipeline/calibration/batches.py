"""Text -> token ids -> windows of equal length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.errors import InputError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Windows:
    """Sequences to run a model on.

    Attributes:
        tokens: int64 [samples, length].
        requested: Samples that were asked for.
        dropped: How many of them the text was too short for.
    """

    tokens: Tensor
    requested: int
    dropped: int


def tokenize(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Ids of a whole text without special tokens, int64 [tokens].

    The text is not cut first: a cut would change the ids around it.

    Raises:
        InputError: The text has no tokens.
    """
    ids = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, verbose=False
    ).input_ids
    if not ids:
        raise InputError("the text has no tokens")
    return torch.tensor(ids, dtype=torch.int64)


def prepended_bos(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Id of the token that the tokenizer puts before every text, or None."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    marked = tokenizer("a").input_ids
    if len(marked) > len(plain) and marked[0] == tokenizer.bos_token_id:
        return int(marked[0])
    return None


def sample_windows(
    token_ids: Tensor, *, samples: int, length: int, seed: int, bos_id: int | None = None
) -> Windows:
    """Windows that do not overlap, spread evenly over the text.

    The text is cut into as many stretches as samples, and each gives one window at random. Windows
    come in text order.

    Args:
        token_ids: int64 [tokens], without special tokens.
        samples: Windows wanted; fewer come if the text is too short.
        length: Tokens of a window, with `bos_id`.
        seed: Of the choice; global random state is neither read nor changed.
        bos_id: Token to put first in every window, or None.

    Raises:
        InputError: The text does not fill one window.
        UsageError: No samples, or no room for text in a window.
    """
    stride = length - (bos_id is not None)
    if samples < 1 or stride < 1:
        raise UsageError(f"cannot cut {samples} windows of {length} tokens", fix="ask for more")
    available = len(token_ids) // stride
    if available == 0:
        raise InputError(
            f"the text has {len(token_ids)} tokens, one window needs {stride}",
            fix="give more text or a shorter window",
        )
    taken = min(samples, available)
    edges = torch.arange(taken + 1, dtype=torch.int64) * available // taken
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(taken, generator=generator, dtype=torch.float64)
    chosen = edges[:-1] + (draws * edges.diff()).long()
    tokens = token_ids[: available * stride].view(available, stride)[chosen].long()
    if bos_id is not None:
        tokens = torch.cat([torch.full((taken, 1), bos_id), tokens], dim=1)
    return Windows(tokens, requested=samples, dropped=samples - taken)


def other_windows(
    token_ids: Tensor, used: Tensor, *, samples: int, seed: int, bos_id: int | None = None
) -> Tensor:
    """Windows of the same text that were not drawn by `sample_windows`.

    Args:
        token_ids: int64 [tokens], as for `sample_windows`.
        used: What it drew, int64 [n, length]; windows with the same tokens are left out.
        samples: Most windows wanted.
        seed: Of the choice and its order, which are random.
        bos_id: As for `sample_windows`.

    Returns:
        int64 [m, length]; less than `samples`, or none, if the text has no more.
    """
    marked = bos_id is not None
    stride = used.shape[1] - marked
    available = len(token_ids) // stride
    grid = token_ids[: available * stride].view(available, stride).long()
    taken = {tuple(row) for row in used[:, marked:].tolist()}
    free = torch.tensor([i for i, row in enumerate(grid.tolist()) if tuple(row) not in taken])
    generator = torch.Generator().manual_seed(seed)
    chosen = free[torch.randperm(len(free), generator=generator)[:samples]].long()
    tokens = grid[chosen]
    if bos_id is not None:
        tokens = torch.cat([torch.full((len(tokens), 1), bos_id), tokens], dim=1)
    return tokens
