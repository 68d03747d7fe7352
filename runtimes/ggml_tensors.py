"""Tensors of a GGUF model: which there must be, and how to get at their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from exporters.gguf.names import scale_name, why_unscaled
from exporters.gguf.reader import GGUFFile, TensorInfo, quoted
from pipeline.errors import InputError, UnsupportedError
from runtimes.ggml_activations import quantized_matmul
from runtimes.ggml_hparams import Hyperparameters
from runtimes.ggml_types import decoder_of, dequantize, offsets

EMBEDDING = "token_embd.weight"
FREQUENCY_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Linear:
    """A linear of the file with its weights dequantized.

    Attributes:
        weight: float32 [out, in].
        type_name: ggml type it is stored in.
        offsets: ``m`` of affine types, float32 [out, groups].
        bias: float32 [out].
        scale: Scale of the whole tensor, float32 [1], which multiplies outputs before the bias.
        round_activations: Whether to round the input as ggml does.
    """

    weight: Tensor
    type_name: str
    offsets: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    round_activations: bool

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [..., in] -> [..., out]."""
        if self.round_activations:
            out = quantized_matmul(x, self.weight, self.type_name, self.offsets)
        else:
            out = linear(x, self.weight)
        out = out if self.scale is None else out * self.scale
        return out if self.bias is None else out + self.bias


def read_linear(file: GGUFFile, name: str, *, round_activations: bool) -> Linear:
    """The linear ``{name}.weight`` with its ``{name}.bias`` and ``{name}.scale``, if any."""
    info = file.tensors[f"{name}.weight"]
    raw = file.raw(info.name)
    return Linear(
        weight=dequantize(raw, info.type_name, info.shape[1]),
        type_name=info.type_name,
        offsets=offsets(raw, info.type_name, info.shape[1]),
        bias=read_vector(file, f"{name}.bias") if f"{name}.bias" in file.tensors else None,
        scale=read_vector(file, f"{name}.scale") if f"{name}.scale" in file.tensors else None,
        round_activations=round_activations,
    )


def read_vector(file: GGUFFile, name: str) -> Tensor:
    """A one-dimensional tensor, float32 [n]."""
    info = file.tensors[name]
    return dequantize(file.raw(name), info.type_name, info.shape[0])[0]


def read_rows(file: GGUFFile, name: str, rows: Tensor) -> Tensor:
    """Some rows of a matrix; no others are dequantized.

    Args:
        file: The file.
        name: A matrix [n, width].
        rows: int64, any shape.

    Returns:
        float32 [*rows.shape, width].
    """
    info = file.tensors[name]
    wanted, where = torch.unique(rows, return_inverse=True)
    raw: np.ndarray = file.raw(name)[wanted.numpy()]
    return dequantize(raw, info.type_name, info.shape[1])[where]


def check_tensors(tensors: Mapping[str, TensorInfo], sizes: Hyperparameters) -> None:
    """Refuse a file whose tensors are not exactly those of its architecture.

    Raises:
        InputError: A tensor is missing or has another shape than the hyperparameters say.
        UnsupportedError: A tensor that this graph does not use (stock llama.cpp refuses it too), or
            a type without decoder.
    """
    embedding = tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"the GGUF file has no matrix {EMBEDDING}")
    if sizes.blocks > len(tensors):  # before the names of all blocks are made
        raise InputError(f"{sizes.blocks} blocks cannot be made of {len(tensors)} tensors")
    required, optional = _expected(sizes, vocabulary=embedding.shape[0])
    optional |= _scales(tensors, sizes)
    for name, shape in (required | optional).items():
        info = tensors.get(name)
        if info is None and name in required:
            raise InputError(f"the GGUF file has no tensor {name}")
        if info is not None and info.shape != shape:
            raise InputError(f"tensor {name} is {list(info.shape)}, expected {list(shape)}")
    for info in tensors.values():
        if info.name not in required and info.name not in optional:
            raise UnsupportedError(
                f"tensor {quoted(info.name)} has no place in the {sizes.architecture} graph"
            )
        decoder_of(info.type_name)


def _scales(
    tensors: Mapping[str, TensorInfo], sizes: Hyperparameters
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the scales of whole tensors that the graph multiplies by."""
    found: dict[str, tuple[int, ...]] = {}
    for name in (name for name, info in tensors.items() if len(info.shape) == 2):
        biased = f"{name.removesuffix('weight')}bias" in tensors
        if why_unscaled({"model_type": sizes.architecture}, name, biased=biased) is None:
            found[scale_name(name)] = (1,)
    return found


def _expected(
    sizes: Hyperparameters, vocabulary: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors a file must have, and may have."""
    hidden, wide = sizes.hidden, sizes.feed_forward
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    linears = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    vectors = {"attn_norm": hidden, "ffn_norm": hidden}
    if sizes.architecture == "qwen3":
        vectors |= {"attn_q_norm": sizes.head_dim, "attn_k_norm": sizes.head_dim}
    biased = linears if sizes.architecture == "llama" else ("attn_q", "attn_k", "attn_v")

    required: dict[str, tuple[int, ...]] = {
        EMBEDDING: (vocabulary, hidden),
        "output_norm.weight": (hidden,),
    }
    optional: dict[str, tuple[int, ...]] = {"output.weight": (vocabulary, hidden)}
    if sizes.architecture == "llama":
        optional[FREQUENCY_FACTORS] = (sizes.head_dim // 2,)
    if sizes.architecture == "qwen2":
        optional["output.bias"] = (vocabulary,)
    for block in range(sizes.blocks):
        prefix = f"blk.{block}"
        required |= {f"{prefix}.{name}.weight": shape for name, shape in linears.items()}
        required |= {f"{prefix}.{name}.weight": (size,) for name, size in vectors.items()}
        optional |= {f"{prefix}.{name}.bias": linears[name][:1] for name in biased}
    return required, optional
