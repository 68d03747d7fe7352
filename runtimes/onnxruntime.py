"""ONNX Runtime on the CPU, in this process.

Two modes, which differ in how a product with quantized weights (MatMulNBits) is computed:

* ``exact``: in float32 (accuracy level 1). What is left against PyTorch is float32 noise. Fast at 4
  bits; at 2 and 8 bits the weights are expanded anew in every call, which a window of hundreds of
  tokens hides and a single token does not.
* ``default``: ONNX Runtime's default (accuracy level 4), which rounds activations to 8 bits.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import InputError, UnsupportedError, UsageError, VerificationError
from runtimes.base import Runtime, check_windows

Mode = Literal["exact", "default"]

ACCURACY_LEVEL = "session.qdq_matmulnbits_accuracy_level"
_LEVELS = {"exact": "1", "default": "4"}
_ERRORS_ONLY = 3  # ORT_LOGGING_LEVEL_ERROR
_PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Census:
    """What ONNX Runtime made of the linears of a model.

    Attributes:
        fused: MatMulNBits nodes: products with weights that stay packed.
        float_linears: Products with a constant matrix of floats.
        dequantizers: DequantizeLinear nodes that are left; each would expand its weight in every
            call.
    """

    fused: int
    float_linears: int
    dequantizers: int


class OnnxRuntime(Runtime):
    """A decoder in an ONNX file whose inputs have Optimum's names.

    Args:
        model: ONNX file, its weights and tokenizer.json beside it.
        mode: Arithmetic of quantized products, see the module.
        threads: CPU threads; None for all that this process may use.
        spin: Let threads wait busily, as is ONNX Runtime's default. Many times slower when other
            programs run too.

    Raises:
        InputError: The file does not exist.
        UsageError: No such mode, or no positive number of threads.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        mode: Mode = "exact",
        threads: int | None = None,
        spin: bool = False,
    ) -> None:
        self._model = Path(model)
        if not self._model.is_file():
            raise InputError(
                f"{model} is not a file", fix="export the model first, or fix the path"
            )
        if mode not in _LEVELS:
            raise UsageError(f"ONNX Runtime mode {mode!r}", fix="use exact or default")
        if threads is not None and threads < 1:
            raise UsageError(f"threads {threads}: must be positive")
        self._mode = mode
        self._threads = threads or _cpu_count()
        self._spin = spin
        self._session: Any = None
        self._speed: float | None = None

    @property
    def name(self) -> str:
        """``ONNX Runtime (exact)`` or ``ONNX Runtime (default)``."""
        return f"ONNX Runtime ({self._mode})"

    @property
    def speed(self) -> float | None:
        """Tokens evaluated per second in the last complete run of `logits`; loading not counted."""
        return self._speed

    def logits(self, tokens: Tensor, first: int) -> Iterator[Tensor]:
        """See `Runtime.logits`.

        Memory: the session, and the logits of one whole window.

        Raises:
            InputError: Windows that cannot be evaluated, or a token outside the vocabulary.
            VerificationError: ONNX Runtime refused the file or failed.
        """
        check_windows(tokens, first)
        return self._logits(tokens, first)

    def _logits(self, tokens: Tensor, first: int) -> Iterator[Tensor]:
        _check_vocabulary(tokens, self.vocabulary)
        seconds = 0.0
        for window in tokens.cpu().numpy():
            ids = window[None]
            start = time.perf_counter()
            found, _ = self._run(ids, ids.shape[1], self._no_past(), cached=False)
            seconds += time.perf_counter() - start
            yield torch.from_numpy(found[0, first:-1])
        if seconds:
            self._speed = tokens.numel() / seconds

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """`greedy_batch` of one prompt.

        Raises:
            InputError: An empty prompt, or a token outside the vocabulary.
            VerificationError: ONNX Runtime refused the file or failed.
        """
        if not prompt:
            raise InputError("the prompt is empty", fix="give at least one token")
        found: list[int] = self.greedy_batch(torch.tensor([list(prompt)]), count)[0].tolist()
        return found

    def greedy_batch(self, prompts: Tensor, count: int) -> Tensor:
        """The `count` most probable next tokens, one after the other through the cache.

        No token ends a text. Among equal logits the lowest id wins, as in torch.argmax.

        Args:
            prompts: int64 [prompts, length].
            count: Tokens to add to each.

        Returns:
            int64 [prompts, count].

        Raises:
            InputError: A token outside the vocabulary.
            VerificationError: ONNX Runtime refused the file or failed.
        """
        _check_vocabulary(prompts, self.vocabulary)
        rows, length = prompts.shape
        found = np.zeros((rows, 0), np.int64)
        new, past = prompts.cpu().numpy(), self._no_past(rows)
        while found.shape[1] < count:
            logits, past = self._run(new, length + found.shape[1], past, cached=True)
            new = logits[:, -1].argmax(-1)[:, None]
            found = np.concatenate([found, new], axis=1)
        return torch.from_numpy(found)

    def census(self) -> Census:
        """Counts the nodes that are left after ONNX Runtime's own optimizations.

        The optimized model lies in a temporary folder meanwhile, weights included.

        Raises:
            VerificationError: ONNX Runtime refused the file.
        """
        import onnx

        with tempfile.TemporaryDirectory(prefix="piso-census-") as folder:
            optimized = Path(folder) / "optimized.onnx"
            _start(self._model, self._mode, self._threads, optimized)
            graph = onnx.load(str(optimized), load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        kinds = [node.op_type for node in graph.node]
        return Census(
            fused=kinds.count("MatMulNBits"),
            float_linears=sum(
                node.op_type in _PRODUCTS and not weights.isdisjoint(node.input)
                for node in graph.node
            ),
            dequantizers=kinds.count("DequantizeLinear"),
        )

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime.tokenize`; by the tokenizer.json beside the file.

        Raises:
            UnsupportedError: There is none.
            InputError: It cannot be read.
        """
        return _tokenize(self._model.parent / "tokenizer.json", text)

    def close(self) -> None:
        """Frees the session; a later call starts another."""
        self._session = None

    def _open(self) -> Any:
        if self._session is None:
            self._session = _start(self._model, self._mode, self._threads, spin=self._spin)
        return self._session

    def _no_past(self, rows: int = 1) -> Feeds:
        """A cache of length 0."""
        return {
            value.name: np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self._open().get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def _run(
        self, ids: NDArray[np.int64], total: int, past: Feeds, *, cached: bool
    ) -> tuple[NDArray[np.float32], Feeds]:
        """Logits of the last ids of texts of `total` tokens, and the cache for the next ones."""
        rows, new = ids.shape
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((rows, total), np.int64),
            "position_ids": np.arange(total - new, total)[None].repeat(rows, axis=0),
            **past,
        }
        wanted = ["logits"]
        if cached:
            wanted += [name.replace("past_key_values", "present") for name in past]
        try:
            logits, *presents = self._open().run(wanted, feeds)
        except Exception as error:  # the library's own errors have no common base
            raise VerificationError(
                f"ONNX Runtime failed on {self._model.name}", why=str(error)
            ) from error
        return logits, dict(zip(past, presents, strict=True)) if cached else {}

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model knows."""
        return int(next(v for v in self._open().get_outputs() if v.name == "logits").shape[2])


def _check_vocabulary(tokens: Tensor, vocabulary: int) -> None:
    outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if len(outside):
        raise InputError(
            f"token {outside[0].item()} in a vocabulary of {vocabulary}",
            why="the text was encoded with another tokenizer",
        )


def _start(
    model: Path, mode: Mode, threads: int, optimized: Path | None = None, *, spin: bool = False
) -> Any:
    """A session; the model as ONNX Runtime optimized it goes to `optimized`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry(ACCURACY_LEVEL, _LEVELS[mode])
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights"
        )
    try:
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own errors have no common base
        raise VerificationError(f"ONNX Runtime refused {model.name}", why=str(error)) from error
    names = {value.name for value in session.get_inputs()}
    missing = sorted({"input_ids", "attention_mask", "position_ids"} - names)
    if missing:
        raise InputError(f"{model} is not a decoder", why=f"it has no input {missing[0]}")
    return session


def _tokenize(path: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UnsupportedError(f"no {path.name} beside the model in {path.parent}")
    try:
        ids: list[int] = Tokenizer.from_file(str(path)).encode(text).ids
    except Exception as error:  # the library raises nothing more special
        raise InputError(f"{path} cannot tokenize the text", why=str(error)) from error
    return ids


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
