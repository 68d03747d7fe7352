"""The child process of `runtimes.llamacpp`: one request on stdin, answers on stdout.

Uses the low-level C API of llama-cpp-python. Nothing is freed: the process ends with its request.
Started as ``python -m runtimes.llamacpp_worker``; imports no torch, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.errors import (
    InputError,
    PipelineError,
    ResourceError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from runtimes.llamacpp_decode import Evaluator, limit_allocations, load
from runtimes.llamacpp_process import describe, write_message
from runtimes.llamacpp_trace import GraphTap


def logits(
    channel: BinaryIO,
    payload: bytes,
    *,
    model: str,
    windows: int,
    context: int,
    first: int,
    exact: bool,
    threads: int,
    memory_limit: int | None,
) -> None:
    """Sends the vocabulary size, then rows of float32 logits in window order, then the speed."""
    tokens = np.frombuffer(payload, np.int64).reshape(windows, context)
    evaluator = Evaluator(model, tokens, range(first, context - 1))
    limit_allocations(memory_limit)
    evaluator.start(exact=exact, threads=threads)
    write_message(channel, {"vocabulary": evaluator.vocabulary}, b"")
    for rows in evaluator.run():
        write_message(channel, {"rows": len(rows)}, rows.data.cast("B"))
    write_message(channel, {"speed": tokens.size / evaluator.seconds}, b"")


def trace(
    channel: BinaryIO,
    payload: bytes,
    *,
    model: str,
    exact: bool,
    threads: int,
    memory_limit: int | None,
) -> None:
    """Sends the number of blocks, then each traced tensor with its width, as it is computed."""
    tokens = np.frombuffer(payload, np.int64)[None]
    evaluator = Evaluator(model, tokens, range(tokens.size))
    limit_allocations(memory_limit)

    def send(values: np.ndarray) -> None:
        width = values.size // tokens.size
        write_message(channel, {"width": width}, values.data.cast("B"))

    tap = GraphTap(evaluator.blocks, send)
    evaluator.start(exact=exact, threads=threads, callback=tap.callback)
    write_message(channel, {"blocks": evaluator.blocks}, b"")
    for _ in evaluator.run():
        tap.finish()


def tokenize(
    channel: BinaryIO, payload: bytes, *, model: str, texts: list[str], parse_special: bool
) -> None:
    """Sends the ids of each text, and the BOS that the model wants, if any."""
    import llama_cpp

    vocabulary = llama_cpp.llama_model_get_vocab(load(model, vocab_only=True))
    if llama_cpp.llama_vocab_type(vocabulary) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        raise UnsupportedError(
            f"{Path(model).name} holds no tokenizer",
            why='its tokenizer.ggml.model is "none"',
            fix="export the tokenizer with the model, or evaluate token ids",
        )
    bos = llama_cpp.llama_vocab_bos(vocabulary)
    add_bos = llama_cpp.llama_vocab_get_add_bos(vocabulary)
    ids = [_encode(vocabulary, text.encode(), parse_special=parse_special) for text in texts]
    write_message(channel, {"ids": ids, "bos": bos if add_bos and bos >= 0 else None}, b"")


def _encode(vocabulary: Any, text: bytes, *, parse_special: bool) -> list[int]:
    import llama_cpp

    room = len(text) + 16  # no token is shorter than a byte, but for BOS, EOS and a space prefix
    for _ in range(2):
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(
            vocabulary, text, len(text), ids, room, True, parse_special
        )
        if count >= 0:
            return ids[:count]
        room = -count
    raise VerificationError(f"llama_tokenize failed on a text of {len(text)} bytes")


def quantize(
    channel: BinaryIO,
    payload: bytes,
    *,
    source: str,
    destination: str,
    file_type: str,
    pure: bool,
    token_embedding_type: str | None,
    output_tensor_type: str | None,
    imatrix: list[tuple[str, int]] | None,
    threads: int,
) -> None:
    """Writes `destination`; `payload` holds the importance vectors in the order of `imatrix`."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.pure = pure
    params.ftype = _constant(("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"), file_type)
    if token_embedding_type is not None:
        params.token_embedding_type = _constant(("GGML_TYPE_",), token_embedding_type)
    if output_tensor_type is not None:
        params.output_tensor_type = _constant(("GGML_TYPE_",), output_tensor_type)
    if imatrix is not None:
        params.imatrix = importance(imatrix, np.frombuffer(payload, np.float32))
    status = llama_cpp.llama_model_quantize(
        os.fsencode(source), os.fsencode(destination), ctypes.byref(params)
    )
    if status != 0:
        raise InputError(
            f"llama.cpp cannot quantize {Path(source).name} to {file_type}",
            fix="quantize from an F32, F16 or BF16 file; IQ1, IQ2 and Q2_K_S need an imatrix",
        )
    write_message(channel, {"done": True}, b"")


def importance(names: Sequence[tuple[str, int]], values: np.ndarray) -> Any:
    """The array of `llama_model_imatrix_data` that `llama_model_quantize` reads."""
    import llama_cpp

    entries = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()  # the last one stays NULL
    start = 0
    for entry, (name, size) in zip(entries, names, strict=False):
        vector = (ctypes.c_float * size).from_buffer_copy(values[start : start + size].tobytes())
        entry.name, entry.size = name.encode(), size
        entry.data = ctypes.cast(vector, ctypes.POINTER(ctypes.c_float))
        start += size
    return ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))


def _constant(prefixes: Sequence[str], name: str) -> int:
    import llama_cpp

    names = {
        constant.removeprefix(prefix): value
        for prefix in prefixes
        for constant, value in vars(llama_cpp).items()
        if constant.startswith(prefix)
    }
    if name not in names:
        raise UsageError(
            f"llama.cpp knows no type {name}",
            why=f"it has {', '.join(sorted(names))}",
            fix="use one of these names",
        )
    value: int = names[name]
    return value


OPERATIONS: Mapping[str, Callable[..., None]] = {
    "logits": logits,
    "trace": trace,
    "tokenize": tokenize,
    "quantize": quantize,
}


def main() -> None:
    """Serves the one request on stdin."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever llama.cpp prints belongs to the log
    request = json.loads(sys.stdin.buffer.readline())
    payload = sys.stdin.buffer.read(request["bytes"])
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        _callback = _warnings_to_stderr()
        OPERATIONS[request["operation"]](channel, payload, **request["arguments"])
    except PipelineError as error:
        write_message(channel, describe(error), b"")
    except MemoryError as error:
        write_message(channel, describe(ResourceError("out of memory", why=str(error))), b"")


def _warnings_to_stderr() -> object:
    """Routes llama.cpp's warnings and errors to stderr; the result has to be kept.

    llama-cpp-python's own filter takes the levels for those of an older ggml.

    Raises:
        UnsupportedError: llama.cpp cannot be loaded.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsupportedError(
            "llama.cpp cannot be loaded", why=str(error), fix="reinstall llama-cpp-python"
        ) from error
    warning, error_level = 3, 4  # ggml.h

    def write(level: int, text: bytes, _: object) -> None:
        if level in (warning, error_level):
            os.write(2, text)

    callback = llama_cpp.llama_log_callback(write)
    llama_cpp.llama_log_set(callback, None)
    return callback


def _exit_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
    os._exit(0)  # a destructor of llama.cpp that logs would call into a dead interpreter
