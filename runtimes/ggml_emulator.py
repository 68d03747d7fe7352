"""llama.cpp's CPU arithmetic in PyTorch, from a GGUF file alone.

An engine that is always there: it needs neither llama.cpp nor the Hugging Face folder. With rounded
activations it predicts what stock llama.cpp computes (float32 key-value cache, no flash attention);
without, it is the float twin of the file. Blocks stream: one is dequantized at a time.

Graphs: src/models/{llama,qwen2,qwen3}.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from exporters.gguf.reader import GGUFFile, open_gguf
from pipeline.errors import InputError
from runtimes.base import Runtime, check_windows
from runtimes.ggml_hparams import Hyperparameters, read_hyperparameters
from runtimes.ggml_tensors import (
    EMBEDDING,
    FREQUENCY_FACTORS,
    Linear,
    check_tensors,
    read_linear,
    read_rows,
    read_vector,
)
from runtimes.gguf_tokenizer import build_tokenizer
from runtimes.trace import BLOCK_TENSORS, check_traced

_TOKENS_AT_ONCE = 2048  # bounds the activations inside a block


class GGMLEmulator(Runtime):
    """A GGUF file of a llama, qwen2 or qwen3 model, evaluated in PyTorch on the CPU.

    Args:
        path: GGUF file.
        round_activations: Round the input of every matrix product as ggml's CPU backend does.

    Raises:
        InputError: The file is damaged, or its tensors do not fit its hyperparameters.
        UnsupportedError: Another architecture, or a tensor or type that is not implemented.
    """

    def __init__(self, path: str | Path, *, round_activations: bool = True) -> None:
        self._round = round_activations
        self._file = open_gguf(Path(path))
        self._sizes = read_hyperparameters(self._file.metadata)
        check_tensors(self._file.tensors, self._sizes)

    @property
    def name(self) -> str:
        """``ggml emulator``, or ``ggml emulator (float)`` without rounding."""
        return "ggml emulator" if self._round else "ggml emulator (float)"

    def close(self) -> None:
        """Lets go of the file; safe to call twice."""
        self._file.close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with BOS or EOS if the file asks for them.

        Raises:
            InputError: The text cannot be encoded in UTF-8, or the vocabulary contradicts itself.
            UnsupportedError: The file holds no tokenizer that can be rebuilt.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("text cannot be encoded in UTF-8", why=str(error)) from error
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return build_tokenizer(self._file.metadata)

    def logits(self, tokens: Tensor, first: int) -> Iterator[Tensor]:
        """Logits of windows that are evaluated independently of each other.

        Memory: the hidden states of all windows, one block's weights, then the head's.

        Args:
            tokens: int64 [windows, context].
            first: First position whose logits are wanted.

        Yields:
            For each window, in order, float32 [context - 1 - first, vocabulary].

        Raises:
            InputError: Tokens of another shape, or outside the vocabulary.
        """
        check_windows(tokens, first)
        self._check_vocabulary(tokens)
        return self._logits(tokens.cpu(), first)

    @torch.no_grad()
    def _logits(self, tokens: Tensor, first: int) -> Iterator[Tensor]:
        if tokens.numel() == 0:
            return
        hidden = read_rows(self._file, EMBEDDING, tokens)
        cos, sin = self._rope_tables(tokens.shape[1])
        for index in range(self._sizes.blocks):
            block = _Block(self._file, index, self._sizes, self._round)
            for windows in hidden.split(max(1, _TOKENS_AT_ONCE // tokens.shape[1])):
                windows += block.attention(windows, cos, sin)
                windows += block.feed_forward(windows)
        norm, head = self._final_norm(), self._head()
        for window in hidden:
            yield head(norm(window[first:-1]))

    @torch.no_grad()
    def trace(self, tokens: Tensor) -> Iterator[dict[str, Tensor]]:
        """Tensors from inside the evaluation of one window, see `runtimes.trace`.

        Args:
            tokens: int64 [context].

        Raises:
            InputError: Tokens of another shape, or outside the vocabulary.
        """
        check_traced(tokens)
        self._check_vocabulary(tokens)
        hidden = read_rows(self._file, EMBEDDING, tokens.cpu()[None])
        cos, sin = self._rope_tables(len(tokens))
        for index in range(self._sizes.blocks):
            traced = _Block(self._file, index, self._sizes, self._round).trace(hidden, cos, sin)
            hidden = traced["mlp"]
            yield {name: values[0] for name, values in traced.items()}
        normed = self._final_norm()(hidden[0])
        yield {"head": normed, "logits": self._head()(normed)}

    def _check_vocabulary(self, tokens: Tensor) -> None:
        vocabulary = self._file.tensors[EMBEDDING].shape[0]
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise InputError(f"a token id is outside the vocabulary of {vocabulary}")

    def _rope_tables(self, length: int) -> tuple[Tensor, Tensor]:
        scaled = FREQUENCY_FACTORS in self._file.tensors
        factors = read_vector(self._file, FREQUENCY_FACTORS) if scaled else None
        return self._sizes.rope.tables(length, factors)

    def _final_norm(self) -> Callable[[Tensor], Tensor]:
        weight = read_vector(self._file, "output_norm.weight")
        return lambda x: rms_norm(x, weight.shape, weight, self._sizes.rms_epsilon)

    def _head(self) -> Linear:
        tied = "output.weight" not in self._file.tensors
        name = "token_embd" if tied else "output"
        return read_linear(self._file, name, round_activations=self._round)


class _Block:
    """One decoder block with dequantized weights."""

    def __init__(
        self, file: GGUFFile, index: int, sizes: Hyperparameters, round_activations: bool
    ) -> None:
        self._sizes = sizes
        prefix = f"blk.{index}."
        names = [
            name.removeprefix(prefix).removesuffix(".weight")
            for name in file.tensors
            if name.startswith(prefix) and name.endswith(".weight")
        ]
        self._norms = {
            name: read_vector(file, f"{prefix}{name}.weight")
            for name in names
            if name.endswith("_norm")
        }
        self._linears = {
            name: read_linear(file, prefix + name, round_activations=round_activations)
            for name in names
            if not name.endswith("_norm")
        }

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal attention in each window, [windows, length, hidden] -> the same."""
        return self._linears["attn_output"](self._mixed(self._norm(x, "attn_norm"), cos, sin))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Gated MLP, [windows, length, hidden] -> the same."""
        return self._linears["ffn_down"](self._gated(self._norm(x, "ffn_norm")))

    def trace(self, x: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Tensor]:
        """`runtimes.trace.BLOCK_TENSORS`, [windows, length, width] each."""
        qkv = self._norm(x, "attn_norm")
        o = self._mixed(qkv, cos, sin)
        attention = x + self._linears["attn_output"](o)
        gate_up = self._norm(attention, "ffn_norm")
        down = self._gated(gate_up)
        mlp = attention + self._linears["ffn_down"](down)
        tensors = (qkv, o, attention, gate_up, down, mlp)
        return dict(zip(BLOCK_TENSORS, tensors, strict=True))

    def _mixed(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Concatenated heads' outputs, [windows, length, heads * head_dim]."""
        rope = self._sizes.rope
        queries = rope.rotate(self._heads(x, "attn_q"), cos, sin)
        keys = rope.rotate(self._heads(x, "attn_k"), cos, sin)
        values = self._heads(x, "attn_v")
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2)

    def _gated(self, x: Tensor) -> Tensor:
        """Input of the down projection, [windows, length, feed_forward]."""
        return silu(self._linears["ffn_gate"](x)) * self._linears["ffn_up"](x)

    def _heads(self, x: Tensor, name: str) -> Tensor:
        """[windows, heads, length, head_dim], normed if the architecture does so."""
        heads = self._linears[name](x).unflatten(-1, (-1, self._sizes.head_dim)).transpose(1, 2)
        return self._norm(heads, f"{name}_norm") if f"{name}_norm" in self._norms else heads

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._norms[name]
        return rms_norm(x, weight.shape, weight, self._sizes.rms_epsilon)
