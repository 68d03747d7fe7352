"""Logits of token windows through llama.cpp's C API; runs in the child process.

Nothing is freed: the process ends with its request.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import InputError, ResourceError, VerificationError

BATCH_TOKENS = 2048
"""Tokens of a `llama_decode` call that holds several windows, as in llama-perplexity."""

PIECE_TOKENS = 512
"""Tokens of a `llama_decode` call that holds a part of a window; llama.cpp's own micro-batch."""

LOGITS_BYTES = 2**28
"""Ceiling of llama.cpp's buffer of logits, unless one piece needs more."""

MAX_SEQUENCES = 16
"""llama.cpp pads the cache of each window to 256 tokens; many short windows would waste it."""


def plan(windows: int, context: int, rows: int, vocabulary: int) -> tuple[int, int]:
    """How windows are laid into `llama_decode` calls.

    Args:
        windows: Windows to evaluate.
        context: Tokens in each.
        rows: Rows of logits wanted from each.
        vocabulary: Logits in a row.

    Returns:
        Windows evaluated side by side, and tokens in a call: all of these windows, or a piece of
        one window.
    """
    fitting = min(BATCH_TOKENS // context, LOGITS_BYTES // (4 * rows * vocabulary), MAX_SEQUENCES)
    if fitting > 1:
        sequences = min(windows, fitting)
        return sequences, sequences * context
    return 1, min(context, PIECE_TOKENS)


def load(model: str, *, vocab_only: bool = False) -> Any:
    """The model handle; tensors stay in the mapped file.

    Extra buffer types repack weights for AMX and other wide units. They are off: natively built
    llama.cpp crashes with them on AMX CPUs for batches > 1 (ggml-org/llama.cpp issue 20824).
    """
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.check_tensors = True
    params.use_extra_bufts = False
    params.n_gpu_layers = 0
    handle = llama_cpp.llama_model_load_from_file(os.fsencode(model), params)
    if handle is None:
        raise VerificationError(
            f"llama.cpp refuses to load {Path(model).name}",
            fix="the file is truncated, not GGUF, or newer than this llama.cpp: write it again",
        )
    return handle


def limit_allocations(limit: int | None) -> None:
    """Makes further allocations beyond `limit` bytes, or beyond what is free, fail at once.

    Linux grants any amount and kills some process later; a failed allocation has a message.
    Mapped model files do not count.
    """
    if sys.platform != "linux":
        return
    import resource

    if limit is None:
        limit = _kernel_bytes("/proc/meminfo", "MemAvailable", "SwapFree")
    used = _kernel_bytes("/proc/self/status", "VmData")
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    with contextlib.suppress(ValueError):  # a stricter limit is already in force
        resource.setrlimit(resource.RLIMIT_DATA, (used + limit, hard))


def _kernel_bytes(path: str, *keys: str) -> int:
    fields = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return 1024 * sum(int(fields[key].split()[0]) for key in keys)


class Evaluator:
    """Logits of windows by `llama_decode`.

    Args:
        model: GGUF file.
        tokens: int64 [windows, context].
        scored: Positions whose logits are wanted.

    Raises:
        VerificationError: llama.cpp refuses the file.
        InputError: A token is outside the vocabulary.
    """

    def __init__(self, model: str, tokens: np.ndarray, scored: range) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._tokens, self._scored = tokens, scored
        self._model = load(model)
        self.blocks: int = llama_cpp.llama_model_n_layer(self._model)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary: int = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.seconds = 0.0
        if tokens.max() >= self.vocabulary:
            raise InputError(
                f"token id {tokens.max()} is outside the vocabulary of {Path(model).name}",
                why=f"it has {self.vocabulary} tokens",
                fix="use the tokenizer that belongs to the file",
            )
        windows, context = tokens.shape
        self._sequences, self._call = plan(windows, context, len(scored), self.vocabulary)

    def start(self, *, exact: bool, threads: int, callback: Any = None) -> None:
        """Allocates the cache.

        Args:
            exact: float32 cache and no flash attention, instead of llama.cpp's defaults.
            threads: CPU threads.
            callback: ``ggml_backend_sched_eval_callback`` that is shown the graph's tensors; the
                caller keeps it alive.

        Raises:
            ResourceError: There is no room for it.
        """
        api = self._api
        params = api.llama_context_default_params()
        params.n_ctx = self._sequences * self._tokens.shape[1]
        params.n_seq_max = self._sequences
        params.n_batch = self._call
        params.n_threads = params.n_threads_batch = threads
        params.offload_kqv = params.op_offload = False
        if exact:
            params.type_k = params.type_v = api.GGML_TYPE_F32
            params.flash_attn_type = 0  # disabled; it would round keys and values to float16
        if callback is not None:
            params.cb_eval = callback
        self._context = api.llama_init_from_model(self._model, params)
        if self._context is None:
            raise ResourceError(
                f"llama.cpp has no room for {params.n_ctx} tokens",
                fix="use shorter windows, or free memory",
            )
        self._batch = api.llama_batch_init(self._call, 0, 1)

    def run(self) -> Iterator[np.ndarray]:
        """float32 [rows, vocabulary], valid until the next one; windows in order."""
        windows, context = self._tokens.shape
        memory = self._api.llama_get_memory(self._context)
        for start in range(0, windows, self._sequences):
            self._api.llama_memory_clear(memory, True)
            group = self._tokens[start : start + self._sequences].tolist()
            flat = [(s, p, window[p]) for s, window in enumerate(group) for p in range(context)]
            for offset in range(0, len(flat), self._call):
                rows = self._decode(flat[offset : offset + self._call])
                if len(rows):
                    yield rows

    def _decode(self, cells: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """Logits of the scored ones among cells (sequence, position, token)."""
        batch = self._batch
        batch.n_tokens = len(cells)
        scored = 0
        for i, (sequence, position, token) in enumerate(cells):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted = position in self._scored
            scored += wanted
        started = time.perf_counter()
        status = self._api.llama_decode(self._context, batch)
        pointer = self._api.llama_get_logits(self._context)
        self.seconds += time.perf_counter() - started
        if status != 0:
            out_of_memory = status == -2  # include/llama.h
            kind = ResourceError if out_of_memory else VerificationError
            raise kind(f"llama_decode failed with status {status} on {len(cells)} tokens")
        if not scored:
            return np.empty((0, self.vocabulary), np.float32)
        return np.ctypeslib.as_array(pointer, shape=(scored, self.vocabulary))
