"""Tensors from inside a forward pass, so that a runtime can be checked one product at a time.

Rounding makes whole forward passes incomparable: a difference in the last bit flips the 8-bit
rounding of some activations, and a few products later two correct runs are as far apart as the
rounding noise itself. One product on given inputs has no such excuse.

A trace is one mapping a decoder block, in order, and one for the head; values are float32
[context, width].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pipeline.errors import InputError

BLOCK_TENSORS = ("qkv", "o", "attention", "gate_up", "down", "mlp")
"""Of a decoder block: the inputs of its sites (``qkv`` and ``gate_up`` are the norms' outputs,
``o`` the heads', ``down`` the gated product), and the residual stream after ``attention`` and after
the ``mlp``."""

HEAD_TENSORS = ("head", "logits")
"""The output of the final norm, and the logits."""

TRACED_TOKENS = 512
"""Most tokens of a trace: what llama.cpp evaluates as one graph."""

Trace = Callable[[Tensor], Iterator[Mapping[str, Tensor]]]
"""``trace(tokens [context])``, the method of a runtime."""


def check_traced(tokens: Tensor) -> None:
    """Rejects what cannot be traced.

    Raises:
        InputError: `tokens` is not int64 [context] with 1 to `TRACED_TOKENS` ids, none negative.
    """
    if tokens.ndim != 1 or tokens.dtype != torch.int64:
        raise InputError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}",
            why="a traced window is int64 [context]",
        )
    if not 1 <= len(tokens) <= TRACED_TOKENS:
        raise InputError(
            f"cannot trace a window of {len(tokens)} tokens", fix=f"use 1 to {TRACED_TOKENS}"
        )
    if tokens.min() < 0:
        raise InputError(f"negative token id {tokens.min().item()}")
