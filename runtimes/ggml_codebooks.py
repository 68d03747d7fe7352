"""Decoders of ggml's codebook types IQ2 and IQ3, see `runtimes.ggml_types`.

The grids are those of the ``gguf`` package. Products are formed in the order of
``dequantize_row_iq*`` (ggml-quants.c).
"""

from __future__ import annotations

from functools import cache

import gguf
import numpy as np


@cache
def _grid(name: str) -> np.ndarray:
    """Magnitudes of every entry, float32 [entries, 8 or 4]."""
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    grid: np.ndarray = np.array(kind.grid, np.float32).reshape(kind.grid_shape)
    return grid


def _scale(raw: np.ndarray) -> np.ndarray:
    """The first two bytes, float32 [blocks, 1]."""
    return np.ascontiguousarray(raw[:, :2]).view("<f2").astype(np.float32)


def _half_up(raw: np.ndarray, sub: np.ndarray, unit: float) -> np.ndarray:
    """``d (0.5 + s) unit``, float32 [blocks, groups]."""
    return _scale(raw) * (np.float32(0.5) + sub.astype(np.float32)) * np.float32(unit)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibble first, [blocks, n] -> [blocks, 2n]."""
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _signs(packed: np.ndarray) -> np.ndarray:
    """A bit a weight, lowest first: float32 -1 or 1, [blocks, n] -> [blocks, 8n]."""
    negative = np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")
    return np.where(negative, np.float32(-1), np.float32(1))


def _with_parity(seven: np.ndarray) -> np.ndarray:
    """Seven signs and an eighth above that makes their number even (``ksigns_iq2xs``)."""
    seven = seven.astype(np.uint8)
    odd = np.bitwise_xor.reduce(np.unpackbits(seven[..., None], axis=-1), axis=-1)
    return seven | odd << 7


def _word_signs(words: np.ndarray) -> np.ndarray:
    """Four times seven signs in words of 32 bits, uint32 [blocks, 8] -> [blocks, 256]."""
    seven = words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)
    return _signs(_with_parity(seven).reshape(len(words), 32))


def _product(scales: np.ndarray, name: str, entries: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Scale of the group times magnitude times sign, float32 [blocks, 256]."""
    magnitudes = _grid(name)[entries].reshape(len(entries), -1)
    return np.repeat(scales, 256 // scales.shape[1], axis=1) * magnitudes * signs


def iq2_xxs(raw: np.ndarray) -> np.ndarray:
    """Of each 32 weights four entries in bytes, then a word of signs and sub-scale."""
    pairs = np.ascontiguousarray(raw[:, 2:]).reshape(len(raw), 8, 8)
    words = np.ascontiguousarray(pairs[:, :, 4:]).view("<u4")[:, :, 0]
    entries = pairs[:, :, :4].reshape(len(raw), 32)
    return _product(_half_up(raw, words >> 28, 0.25), "IQ2_XXS", entries, _word_signs(words))


def iq2_xs(raw: np.ndarray) -> np.ndarray:
    """Words of 9 bits for the entry and seven signs; sub-scales in nibbles."""
    words = np.ascontiguousarray(raw[:, 2:66]).view("<u2")
    scales = _half_up(raw, _nibbles(raw[:, 66:]), 0.25)
    return _product(scales, "IQ2_XS", words & 511, _signs(_with_parity(words >> 9)))


def iq2_s(raw: np.ndarray) -> np.ndarray:
    """Low bits of the entries, signs, two high bits of each entry, sub-scales."""
    high = raw[:, 66:74, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    entries = raw[:, 2:34] | high.reshape(len(raw), 32).astype(np.uint16) << 8
    scales = _half_up(raw, _nibbles(raw[:, 74:]), 0.25)
    return _product(scales, "IQ2_S", entries, _signs(raw[:, 34:66]))


def iq3_xxs(raw: np.ndarray) -> np.ndarray:
    """64 entries, then words of signs and sub-scale."""
    words = np.ascontiguousarray(raw[:, 66:]).view("<u4")
    return _product(_half_up(raw, words >> 28, 0.5), "IQ3_XXS", raw[:, 2:66], _word_signs(words))


def iq3_s(raw: np.ndarray) -> np.ndarray:
    """Low bits of 64 entries, their ninth bits, signs, sub-scales."""
    ninth = np.unpackbits(np.ascontiguousarray(raw[:, 66:74]), axis=1, bitorder="little")
    entries = raw[:, 2:66] | ninth.astype(np.uint16) << 8
    scales = _scale(raw) * (1 + 2 * _nibbles(raw[:, 106:])).astype(np.float32)
    return _product(scales, "IQ3_S", entries, _signs(raw[:, 74:106]))
