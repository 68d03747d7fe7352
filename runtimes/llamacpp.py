"""Stock llama.cpp, through the C API of llama-cpp-python in a child process.

Two modes, both on the CPU and both without repacked weights, because natively built llama.cpp
crashes on AMX CPUs with them (ggml-org/llama.cpp issue 20824; ``--no-repack`` on its command line):

* ``exact``: float32 key-value cache, no flash attention. What is left against PyTorch is the
  rounding of activations to 8 bits in front of quantized weights, and float32 noise.
* ``default``: llama.cpp's default context, a float16 cache and flash attention.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from exporters.gguf.reader import open_gguf
from pipeline.errors import InputError, ResourceError, UnsupportedError, UsageError
from runtimes.base import Runtime, check_windows
from runtimes.llamacpp_process import WorkerProcess
from runtimes.trace import BLOCK_TENSORS, HEAD_TENSORS, check_traced

Mode = Literal["exact", "default"]

TIME_LIMIT = 600.0
"""Default seconds that llama.cpp may take to load a model, or to evaluate one batch."""


def available() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def version() -> str:
    """Version of the installed llama-cpp-python.

    Raises:
        UnsupportedError: It is not installed.
    """
    _require()
    return importlib.metadata.version("llama-cpp-python")


class LlamaCpp(Runtime):
    """A GGUF file in stock llama.cpp.

    Each call starts a child process that loads the file, so the object itself holds no memory.

    Args:
        model: GGUF file.
        mode: Arithmetic of the context, see the module.
        threads: CPU threads; None for all that this process may use.
        time_limit: Seconds that llama.cpp may take to load the model, or to evaluate one batch.
        memory_limit: Bytes that cache and logits may take (Linux only); None for what is free.

    Raises:
        InputError: The file does not exist.
        UnsupportedError: llama-cpp-python is not installed.
        UsageError: No such mode, or a limit that is not positive.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        mode: Mode = "exact",
        threads: int | None = None,
        time_limit: float = TIME_LIMIT,
        memory_limit: int | None = None,
    ) -> None:
        _require()
        _check_file(Path(model))
        if mode not in ("exact", "default"):
            raise UsageError(f"llama.cpp mode {mode!r}", fix="use exact or default")
        _check_positive(threads=threads, time_limit=time_limit, memory_limit=memory_limit)
        self._model = Path(model).resolve()
        self._mode = mode
        self._threads = threads or _cpu_count()
        self._time_limit = time_limit
        self._memory_limit = memory_limit
        self._workers: set[WorkerProcess] = set()
        self._speed: float | None = None

    @property
    def name(self) -> str:
        """``llama.cpp (exact)`` or ``llama.cpp (default)``."""
        return f"llama.cpp ({self._mode})"

    @property
    def speed(self) -> float | None:
        """Tokens evaluated per second in the last complete run of `logits`; loading not counted."""
        return self._speed

    def logits(self, tokens: Tensor, first: int) -> Iterator[Tensor]:
        """See `Runtime.logits`.

        Memory: one window here; in the child one batch of logits (256 MB, or 512 tokens if that
        is more) and the key-value cache.

        Raises:
            InputError: Windows that cannot be evaluated, or a token outside the vocabulary.
            VerificationError: llama.cpp refused the file, failed or crashed.
            ResourceError: It ran out of memory or time.
        """
        check_windows(tokens, first)
        return self._logits(tokens, first)

    def _logits(self, tokens: Tensor, first: int) -> Iterator[Tensor]:
        windows, context = tokens.shape
        if windows == 0:
            return
        arguments = {"windows": windows, "context": context, "first": first}
        with self._evaluation("logits", arguments, tokens) as worker:
            vocabulary = worker.receive()["vocabulary"]
            ready = 0
            for _ in range(windows):
                window = torch.empty(context - 1 - first, vocabulary)
                filled = 0
                while filled < len(window):
                    ready = ready or worker.receive()["rows"]
                    rows = window[filled : filled + ready]
                    worker.receive_into(rows.numpy().data.cast("B"))
                    filled, ready = filled + len(rows), ready - len(rows)
                yield window
            self._speed = worker.receive()["speed"]

    def trace(self, tokens: Tensor) -> Iterator[dict[str, Tensor]]:
        """Tensors from inside the evaluation of one window, see `runtimes.trace`.

        llama.cpp waits while they are not taken. Memory: those of one block.

        Args:
            tokens: int64 [context], at most `runtimes.trace.TRACED_TOKENS`.

        Raises:
            InputError: A window that cannot be evaluated, or a token outside the vocabulary.
            UnsupportedError: This llama.cpp does not name its tensors as expected.
            VerificationError: llama.cpp refused the file, failed or crashed.
            ResourceError: It ran out of memory or time.
        """
        check_traced(tokens)
        return self._trace(tokens)

    def _trace(self, tokens: Tensor) -> Iterator[dict[str, Tensor]]:
        with self._evaluation("trace", {}, tokens) as worker:

            def receive() -> Tensor:
                values = torch.empty(len(tokens), worker.receive()["width"])
                worker.receive_into(values.numpy().data.cast("B"))
                return values

            for _ in range(worker.receive()["blocks"]):
                yield {name: receive() for name in BLOCK_TENSORS}
            yield {name: receive() for name in HEAD_TENSORS}

    def tokenize(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text by the tokenizer in the file, with BOS or EOS if it wants them.

        Args:
            text: Any text without lone surrogates.
            parse_special: Whether the text of a special token, like ``<|eot|>``, becomes that
                token. True is what a Hugging Face tokenizer does when called on a text; False is
                its ``split_special_tokens=True``, and what llama-perplexity does.

        Raises:
            InputError: The text cannot be encoded in UTF-8.
            UnsupportedError: The file holds no tokenizer.
            VerificationError: llama.cpp refused the file or crashed.
        """
        return self.tokenize_all([text], parse_special=parse_special)[0]

    def tokenize_all(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """`tokenize` of many texts for the price of one load of the file."""
        ids: list[list[int]] = self._tokenize(texts, parse_special)["ids"]
        return ids

    def bos_id(self) -> int | None:
        """The BOS that the file asks to put in front of a text, or None."""
        bos: int | None = self._tokenize([], parse_special=True)["bos"]
        return bos

    def _tokenize(self, texts: Sequence[str], parse_special: bool) -> dict[str, Any]:
        for text in texts:
            _check_encodable(text)
        arguments = {"texts": list(texts), "parse_special": parse_special}
        with self._worker("tokenize", arguments) as worker:
            return worker.receive()

    def close(self) -> None:
        """Ends the child processes of runs that are still open."""
        for worker in tuple(self._workers):
            worker.close()
        self._workers.clear()

    def _evaluation(
        self, operation: str, arguments: Mapping[str, Any], tokens: Tensor
    ) -> contextlib.AbstractContextManager[WorkerProcess]:
        how = {
            "exact": self._mode == "exact",
            "threads": self._threads,
            "memory_limit": self._memory_limit,
        }
        payload = tokens.cpu().contiguous().numpy().data.cast("B")
        return self._worker(operation, {**arguments, **how}, payload)

    @contextlib.contextmanager
    def _worker(
        self, operation: str, arguments: Mapping[str, Any], payload: bytes | memoryview = b""
    ) -> Iterator[WorkerProcess]:
        worker = WorkerProcess(
            operation,
            {**arguments, "model": str(self._model)},
            payload,
            subject=self._model.name,
            time_limit=self._time_limit,
        )
        self._workers.add(worker)
        try:
            yield worker
        finally:
            worker.close()
            self._workers.discard(worker)


def quantize(
    source: str | Path,
    destination: str | Path,
    type: str,  # noqa: A002 - the word of llama-quantize
    *,
    pure: bool = False,
    token_embedding_type: str | None = None,
    output_tensor_type: str | None = None,
    imatrix: Mapping[str, np.ndarray] | None = None,
    threads: int | None = None,
    time_limit: float = 3600.0,
) -> None:
    """Quantizes a GGUF file with llama.cpp's own quantizer: the rival in a benchmark.

    The destination appears complete or not at all.

    Args:
        source: F32, F16 or BF16 GGUF file.
        destination: File to write; an existing one is replaced.
        type: File type without its prefix, like ``Q4_K_S`` or ``Q2_K`` (`LLAMA_FTYPE_MOSTLY_*`).
        pure: Every matrix in the base type, no mixture.
        token_embedding_type: ggml type of the token embedding, like ``Q8_0``; None for llama.cpp's
            choice.
        output_tensor_type: ggml type of the output head, likewise. With a tied head give both.
        imatrix: Importance of each input channel, float32 [in], by tensor name: the mean of the
            squared inputs. Tensors without an entry are quantized without weights.
        threads: CPU threads; None for all that this process may use.
        time_limit: Seconds for the whole.

    Raises:
        InputError: The source is missing or refused, or an importance vector is.
        UnsupportedError: llama-cpp-python is not installed.
        UsageError: llama.cpp has no such type.
        VerificationError: llama.cpp crashed.
        ResourceError: It ran out of memory or time, or the destination cannot be written.
    """
    _require()
    source, destination = Path(source).resolve(), Path(destination).resolve()
    _check_file(source)
    _check_positive(threads=threads, time_limit=time_limit)
    vectors = None if imatrix is None else _importance_vectors(imatrix, source)
    arguments = {
        "source": str(source),
        "file_type": type,
        "pure": pure,
        "token_embedding_type": token_embedding_type,
        "output_tensor_type": output_tensor_type,
        "imatrix": None if vectors is None else [(k, len(v)) for k, v in vectors.items()],
        "threads": threads or _cpu_count(),
    }
    payload = b"".join(vector.tobytes() for vector in (vectors or {}).values())
    with _replaced(destination) as partial:
        arguments["destination"] = str(partial)
        _run("quantize", arguments, payload, subject=source.name, time_limit=time_limit)


def _run(operation: str, arguments: Mapping[str, Any], payload: bytes, **options: Any) -> None:
    with contextlib.closing(WorkerProcess(operation, arguments, payload, **options)) as worker:
        worker.receive()


@contextlib.contextmanager
def _replaced(destination: Path) -> Iterator[Path]:
    """A file beside `destination` that takes its place if all goes well."""
    if not destination.parent.is_dir():
        raise InputError(f"{destination.parent} is not a directory", fix="create it first")
    if not os.access(destination.parent, os.W_OK):
        raise ResourceError(f"cannot write into {destination.parent}", fix="choose another place")
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, destination)
    finally:
        partial.unlink(missing_ok=True)


def _importance_vectors(imatrix: Mapping[str, np.ndarray], source: Path) -> dict[str, np.ndarray]:
    """float32 copies; llama.cpp would skip unknown names, and stop at others only halfway."""
    with open_gguf(source) as file:
        widths = {name: tensor.shape[-1] for name, tensor in file.tensors.items()}
    vectors = {}
    for name, values in imatrix.items():
        vector = np.ascontiguousarray(values, dtype=np.float32)
        if name not in widths or vector.shape != (widths[name],):
            expected = f"[{widths[name]}]" if name in widths else "no such tensor"
            raise InputError(
                f"importance of {name} does not fit {source.name}",
                why=f"it has shape {list(vector.shape)}, expected {expected}",
                fix="collect the importance on this model, and name it like the GGUF tensors",
            )
        if not np.isfinite(vector).all() or (vector < 0).any():
            raise InputError(
                f"importance of {name} is negative or not finite",
                fix="collect it again: it is a mean of squares",
            )
        vectors[name] = vector
    return vectors


def _require() -> None:
    if not available():
        raise UnsupportedError(
            "llama.cpp is not available",
            why="llama-cpp-python is not installed",
            fix="pip install 'piso-deploy[llamacpp]' (compiles llama.cpp for some minutes)",
        )


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is not a file", fix="export the model first, or fix the path")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:  # a NaN is not either
            raise UsageError(f"{name} {value}: must be positive")


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "text cannot be encoded in UTF-8", why=str(error), fix="remove lone surrogates"
        ) from error


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
