"""Codes and scales -> the bytes of the codebook types IQ2 and IQ3 (``block_iq*`` of ggml-common.h).

As in `exporters.gguf.packing`: codes int8 [blocks, 256] and scale fields [blocks, n] in, uint8
[blocks, block bytes] out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import VerificationError
from pipeline.quantization.formats import GGML_FORMATS

Array = NDArray[Any]
Fields = Mapping[str, Array]


def _stored(name: str, codes: Array, scales: Fields) -> tuple[Array, Array, Array, Array]:
    """What all types store: scale bytes, 4-bit sub-scales, entries, and negative weights."""
    codebook = GGML_FORMATS[name].codebook
    if codebook is None:
        raise VerificationError(f"{name} has no codebook")
    entries, negative = codebook.split(torch.from_numpy(codes))
    d = np.ascontiguousarray(scales["d"].astype("<f2")).view(np.uint8)
    return d, scales["sc"].astype(np.uint8) >> 1, entries.numpy(), negative.numpy()


def _sign_bytes(negative: Array) -> Array:
    """Eight signs a byte, the first lowest, uint8 [blocks, 32]."""
    return np.packbits(negative, axis=1, bitorder="little")


def _sub_scale_nibbles(sub: Array) -> Array:
    """[blocks, 2n] -> [blocks, n], the first of two in the low nibble."""
    return sub[:, 0::2] | sub[:, 1::2] << 4


def _words(negative: Array, sub: Array) -> Array:
    """Of each 32 weights four times seven signs and the sub-scale above, uint32 [blocks, 8]."""
    seven = (_sign_bytes(negative) & 127).astype(np.uint32).reshape(-1, 8, 4)
    signs: Array = (seven << np.arange(0, 28, 7, dtype=np.uint32)).sum(2, dtype=np.uint32)
    return signs | sub.astype(np.uint32) << 28


def _iq2_xxs(codes: Array, scales: Fields) -> Array:
    d, sub, entries, negative = _stored("IQ2_XXS", codes, scales)
    groups = entries.astype(np.uint8).reshape(-1, 8, 4)
    words = _words(negative, sub).astype("<u4")[:, :, None].view(np.uint8)
    return np.hstack([d, np.concatenate([groups, words], axis=2).reshape(-1, 64)])


def _iq2_xs(codes: Array, scales: Fields) -> Array:
    d, sub, entries, negative = _stored("IQ2_XS", codes, scales)
    seven = (_sign_bytes(negative) & 127).astype(np.uint16)
    words = (entries.astype(np.uint16) | seven << 9).astype("<u2")
    return np.hstack([d, words.view(np.uint8), _sub_scale_nibbles(sub)])


def _iq2_s(codes: Array, scales: Fields) -> Array:
    d, sub, entries, negative = _stored("IQ2_S", codes, scales)
    high = (entries >> 8).astype(np.uint8).reshape(-1, 8, 4)
    two_bits = (high << np.arange(0, 8, 2, dtype=np.uint8)).sum(2, dtype=np.uint8)
    low = (entries & 255).astype(np.uint8)
    return np.hstack([d, low, _sign_bytes(negative), two_bits, _sub_scale_nibbles(sub)])


def _iq3_xxs(codes: Array, scales: Fields) -> Array:
    d, sub, entries, negative = _stored("IQ3_XXS", codes, scales)
    words = _words(negative, sub).astype("<u4")
    return np.hstack([d, entries.astype(np.uint8), words.view(np.uint8)])


def _iq3_s(codes: Array, scales: Fields) -> Array:
    d, sub, entries, negative = _stored("IQ3_S", codes, scales)
    low = (entries & 255).astype(np.uint8)
    ninth_bits = np.packbits(entries >> 8, axis=1, bitorder="little")
    return np.hstack([d, low, ninth_bits, _sign_bytes(negative), _sub_scale_nibbles(sub)])


CODEBOOK_PACKERS: dict[str, Callable[[Array, Fields], Array]] = {
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
