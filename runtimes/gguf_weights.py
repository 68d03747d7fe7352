"""The weights of a GGUF file under their Hugging Face names, decoded without the packer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters.gguf.names import gguf_name, permute_rope, rope_heads, scale_name
from exporters.gguf.reader import open_gguf
from pipeline.errors import InputError
from runtimes.ggml_activations import quantized_matmul
from runtimes.ggml_types import dequantize, offsets


class GGUFWeights:
    """Reads tensors of a file one at a time.

    Args:
        path: GGUF file.
        config: Content of the model's config.json.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._file = open_gguf(path)
        self._config = config

    def names(self) -> Iterator[str]:
        """GGUF names of all tensors."""
        return iter(self._file.tensors)

    def type_of(self, name: str) -> str:
        """ggml type of a tensor, by GGUF name."""
        return self._file.tensors[name].type_name

    def raw(self, name: str) -> np.ndarray:
        """Stored bytes of a tensor by GGUF name, uint8 [rows, row bytes]."""
        return self._file.raw(name)

    def tensor_scale(self, name: str) -> float:
        """What multiplies all weights of a tensor, by GGUF name; 1 if the file does not say.

        Raises:
            InputError: The file says more than one number.
        """
        scale = scale_name(name)
        if scale not in self._file.tensors:
            return 1.0
        found = self.decode(scale)
        if found.shape != (1,):
            raise InputError(f"tensor {scale} is {list(found.shape)}, expected [1]")
        return float(found)

    def decode(self, name: str) -> Tensor:
        """A tensor as stored, by GGUF name, float32 in its own shape; with its tensor scale."""
        info = self._file.tensors[name]
        stored = dequantize(self.raw(name), info.type_name, info.shape[-1]).reshape(info.shape)
        return stored * self.tensor_scale(name) if name.endswith(".weight") else stored

    def read(self, hf_name: str) -> Tensor:
        """A tensor in the row order of the checkpoint, by Hugging Face name, float32."""
        name = gguf_name(hf_name)
        if hf_name == "lm_head.weight" and name not in self._file.tensors:
            name = gguf_name("model.embed_tokens.weight")
        return self._in_checkpoint_order(name, self.decode(name))

    def rows(self, hf_name: str) -> np.ndarray:
        """Stored bytes of a tensor in the row order of the checkpoint, uint8 [rows, row bytes]."""
        name = gguf_name(hf_name)
        return self._in_checkpoint_order(name, torch.from_numpy(self.raw(name).copy())).numpy()

    def linear(self, hf_name: str) -> Callable[[nn.Linear], nn.Module]:
        """Wrapper that gives a linear llama.cpp's activation rounding for this tensor's type."""
        name = gguf_name(hf_name)
        info = self._file.tensors[name]
        m = offsets(self.raw(name), info.type_name, info.shape[-1])
        ordered = None if m is None else self._in_checkpoint_order(name, m)
        return lambda linear: RoundedLinear(linear, info.type_name, ordered)

    def _in_checkpoint_order(self, name: str, rows: Tensor) -> Tensor:
        heads = rope_heads(self._config, name)
        if heads is None:
            return rows
        order = permute_rope(np.arange(len(rows)), heads)
        restored = torch.empty_like(rows)
        restored[torch.from_numpy(order)] = rows
        return restored

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


class RoundedLinear(nn.Module):
    """A linear whose input is rounded as ggml's CPU backend rounds it for a weight type.

    Args:
        linear: Dequantized weights and bias.
        type_name: ggml type of the weights.
        offsets: Offsets of affine types, [out, groups].
    """

    def __init__(self, linear: nn.Linear, type_name: str, offsets: Tensor | None) -> None:
        super().__init__()
        self._linear = linear
        self._type = type_name
        self._offsets = offsets

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], float32."""
        y = quantized_matmul(x, self._linear.weight, self._type, self._offsets)
        return y if self._linear.bias is None else y + self._linear.bias
