"""How llama.cpp's CPU backend rounds the input of a matrix product, as pure functions.

ggml multiplies quantized weights by quantized activations: each weight type names the type that
its input is rounded to (`vec_dot_type` in ggml-cpu.c). This rounding, about half a percent of the
input, is by far the largest difference between llama.cpp and a float engine with the same weights.

The functions return the rounded input as float32. They follow the SIMD kernels (ties to even); the
scalar fallback of Q8_0 rounds ties away from zero, which concerns about one value in a million.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from pipeline.errors import UnsupportedError, UsageError

Rounding = Callable[[Tensor], Tensor]

Q8_GROUP = 32
Q8_K_GROUP = 256


def round_none(x: Tensor) -> Tensor:
    """F32 weights: the input as it is."""
    return x


def round_f16(x: Tensor) -> Tensor:
    """F16 weights: nearest fp16 of each value, any shape."""
    return x.half().float()


def round_bf16(x: Tensor) -> Tensor:
    """BF16 weights: nearest bfloat16 of each value, any shape."""
    return x.bfloat16().float()


def round_q8_0(x: Tensor) -> Tensor:
    """Groups of 32: codes ``rne(x * 127 / amax)`` times ``fp16(amax / 127)``.

    Args:
        x: float32 [..., in].

    Returns:
        float32 [..., in].
    """
    scale, codes = _q8_codes(x)
    return (codes * scale.half().float()).reshape(x.shape)


def round_q8_1(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `round_q8_0`, with the sums that multiply the offsets of affine weights.

    Args:
        x: float32 [..., in].

    Returns:
        The rounded input, float32 [..., in], and the stored sums ``fp16(d * sum of codes)`` with
        the *unrounded* ``d``, float32 [..., in // 32].
    """
    scale, codes = _q8_codes(x)
    sums = (scale * codes.sum(-1, keepdim=True)).half().float()
    return (codes * scale.half().float()).reshape(x.shape), sums.squeeze(-1)


def round_q8_k(x: Tensor) -> Tensor:
    """Groups of 256 with a float32 scale: codes ``rne(x * 127 / amax)`` times ``amax / 127``.

    ggml gives the scale the opposite sign of the largest value; codes stay within -127..127, so
    the sign cancels out and is left out here.

    Args:
        x: float32 [..., in].

    Returns:
        float32 [..., in].
    """
    groups = _groups(x, Q8_K_GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = _quotient_127(largest)
    codes = torch.round(groups * inverse)
    return torch.where(largest > 0, codes * (1 / inverse), 0.0).reshape(x.shape)


def _q8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 scales [..., groups, 1] and codes [..., groups, 32]."""
    groups = _groups(x, Q8_GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, _quotient_127(largest), 0.0)
    return largest / 127, torch.round(groups * inverse)


def _quotient_127(largest: Tensor) -> Tensor:
    """``127 / largest`` rounded once; ``127 / tensor`` multiplies by a rounded reciprocal."""
    return torch.full_like(largest, 127.0) / largest


def _groups(x: Tensor, size: int) -> Tensor:
    if x.shape[-1] % size:
        raise UnsupportedError(
            f"rows of {x.shape[-1]} do not divide into blocks of {size}",
            why="the weight's type rounds its input in whole blocks",
        )
    return x.float().unflatten(-1, (-1, size))


_ROUNDED: dict[str, Rounding] = {
    "F32": round_none,
    "F16": round_f16,
    "BF16": round_bf16,
    **dict.fromkeys(
        ("Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"), round_q8_0
    ),
    **dict.fromkeys(
        (
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "IQ4_XS"),
            *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
        ),
        round_q8_k,
    ),
}
AFFINE_TYPES = frozenset({"Q4_1", "Q5_1"})


def activation_rounding(weight_type: str) -> Rounding:
    """The rounding that a weight type imposes on its input, float32 [..., in] -> the same.

    For affine types this is the codes' part only; `quantized_matmul` adds what the offsets see.

    Raises:
        UnsupportedError: Unknown type.
    """
    if weight_type in AFFINE_TYPES:
        return round_q8_0
    rounding = _ROUNDED.get(weight_type)
    if rounding is None:
        raise UnsupportedError(
            f"unknown ggml type {weight_type}",
            fix=f"known: {', '.join(sorted({*_ROUNDED, *AFFINE_TYPES}))}",
        )
    return rounding


def quantized_matmul(
    x: Tensor, weight: Tensor, type_name: str, offsets: Tensor | None = None
) -> Tensor:
    """``x @ weight.T`` as llama.cpp computes it with weights stored as `type_name`.

    Exact up to float32 summation order. For affine types (``w = d q + m``, groups of 32) ggml
    computes ``sum d d_x q q_x + sum m s`` with ``s = fp16(d_x sum q_x)``: the offsets meet another
    input than the codes do, and the difference is added to the plain product.

    Args:
        x: float32 [..., in].
        weight: Dequantized weights, float32 [out, in].
        type_name: ggml name of the stored type.
        offsets: ``m`` of the affine types Q4_1 and Q5_1, float32 [out, in // 32]; else unused.

    Returns:
        float32 [..., out].

    Raises:
        UnsupportedError: Unknown type, or the width does not divide into its blocks.
        UsageError: Offsets are missing or of the wrong shape for an affine type.
    """
    if type_name not in AFFINE_TYPES:
        return linear(activation_rounding(type_name)(x), weight)
    expected = (weight.shape[0], weight.shape[1] // Q8_GROUP)
    if offsets is None or tuple(offsets.shape) != expected:
        given = "none" if offsets is None else f"{list(offsets.shape)}"
        raise UsageError(
            f"{type_name} needs offsets {list(expected)}, got {given}",
            why="ggml multiplies offsets by separately rounded sums of the input",
        )
    rounded, sums = round_q8_1(x)
    excess = sums - _groups(rounded, Q8_GROUP).sum(-1)
    return linear(rounded, weight) + linear(excess, offsets)
