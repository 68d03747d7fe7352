"""Reads tensors out of llama.cpp's graph while it runs; for the child process.

Tensors are named by the graphs in src/models/{llama,qwen2,qwen3}.cpp. Without flash attention and
with every position scored, each of them holds all tokens, in order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np

from pipeline.errors import UnsupportedError

BLOCK_NAMES = {
    "qkv": "attn_norm",
    "o": "kqv_out",
    "attention": "ffn_inp",
    "gate_up": "ffn_norm",
    "down": "ffn_swiglu",
    "mlp": "l_out",
}
"""llama.cpp's words for `runtimes.trace.BLOCK_TENSORS`; in the graph, ``-<block>`` follows."""

HEAD_NAMES = {"head": "result_norm", "logits": "result_output"}
"""llama.cpp's words for `runtimes.trace.HEAD_TENSORS`."""


def graph_names(blocks: int) -> Iterator[str]:
    """Names of the traced tensors of a model, in the order of their computation."""
    for index in range(blocks):
        yield from (f"{name}-{index}" for name in BLOCK_NAMES.values())
    yield from HEAD_NAMES.values()


class GraphTap:
    """Hands over the tensors of one evaluation as they are computed.

    Args:
        blocks: Decoder blocks of the model.
        take: Gets each of `graph_names` in order, as float32 [elements].

    Attributes:
        callback: For `llama_context_params.cb_eval`; lives as long as this object.
    """

    def __init__(self, blocks: int, take: Callable[[np.ndarray], None]) -> None:
        import llama_cpp

        self._names = list(graph_names(blocks))
        self._wanted = {name.encode() for name in self._names}
        self._taken = 0
        self._take = take
        self._error: BaseException | None = None
        self._read = _Reader()
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._visit)

    def finish(self) -> None:
        """Raises what went wrong during the evaluation.

        Raises:
            UnsupportedError: The graph lacks one of the tensors, or computes them in another order.
        """
        if self._error is not None:
            raise self._error
        if self._taken < len(self._names):
            raise _missing(self._names[self._taken])

    def _visit(self, tensor: int, asking: bool, _: object) -> bool:
        """Called for every tensor of the graph with `asking`, and again with the value if wanted.

        An exception may not pass through C; False as the second answer ends the evaluation.
        """
        try:
            name = self._read.name(tensor)
            if asking:
                return name in self._wanted
            if name != self._names[self._taken].encode():
                raise _missing(self._names[self._taken])
            self._take(self._read.values(tensor))
            self._taken += 1
        except BaseException as error:
            self._error = self._error or error
            return False
        return True


def _missing(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"llama.cpp's graph has no tensor {name} in its place",
        why="this llama.cpp names or orders the tensors of its graphs differently",
        fix="use llama-cpp-python 0.3.36, or switch llama.cpp off",
    )


class _Reader:
    """The functions of ggml that look into a tensor; libllama is linked with them."""

    def __init__(self) -> None:
        from llama_cpp import ctypes_function

        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._name = ctypes_function("ggml_get_name", [pointer], ctypes.c_char_p)(None)
        self._nbytes = ctypes_function("ggml_nbytes", [pointer], size)(None)
        get = ctypes_function("ggml_backend_tensor_get", [pointer, pointer, size, size], None)
        self._get = get(None)

    def name(self, tensor: int) -> bytes:
        """Name of a tensor in the graph."""
        name: bytes = self._name(tensor)
        return name

    def values(self, tensor: int) -> np.ndarray:
        """A float32 tensor, flat."""
        values = np.empty(self._nbytes(tensor) // 4, np.float32)
        self._get(tensor, values.ctypes.data, 0, values.nbytes)
        return values
