"""Quantized weights as ONNX holds them: codes of 2, 4 or 8 bits, fp16 scales, zero points.

Symmetric formats are two's complement integers, formats with zero points unsigned ones.

ONNX has no 3-bit type: 3-bit codes lie in a 4-bit container. MatMulNBits, which ONNX Runtime makes
of a dequantized weight and its product, knows no other widths either.

Floating-point codes are a sign and a magnitude, the bit patterns of E2M1 and E4M3. ONNX Runtime
1.32 on the CPU dequantizes E4M3 (and never fuses it), but neither E2M1 nor E8M0 scales, nor does it
cast E2M1. Patterns of E2M1 are therefore UINT4 and look up a table of int8, which folds into an
8-bit weight and is fused; exponents of E8M0 are bytes and look up a table of powers of two. Both
are exact. A Cast of FLOAT8E8M0 would fold as well, but needs opset 24 and cannot be gathered.

Float zero points exist in MatMulNBits alone, an operator of ONNX Runtime and not of the standard:
such weights are written as that node, rows packed in bytes. It expands them to floats in every
call. With 8 bits ONNX Runtime refuses them on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.onnx.names import EMBEDDING, GROUPS
from pipeline.errors import UnsupportedError, VerificationError
from pipeline.quantization.formats import (
    E2M1_LEVELS,
    E4M3_LEVELS,
    E8M0,
    FP16,
    Format,
    QuantizedTensor,
    zero_offset,
    zero_points,
)

Number = Literal["integer", "e2m1", "e4m3"]
FLOATING: dict[Number, tuple[float, ...]] = {"e2m1": E2M1_LEVELS, "e4m3": E4M3_LEVELS}
"""Levels of floating-point codes; those of E2M1 are doubled, to be integers."""

EXPONENT_OF_ONE = 128
"""Byte of the scale 1 in E8M0: as levels are doubled, a byte counts half of what it says."""

Scales = NDArray[np.float16] | NDArray[np.uint8]
Zeros = NDArray[np.int8] | NDArray[np.float16]

OUTPUTS_AT_2_BITS = 4
"""ONNX Runtime repacks 2-bit weights wrongly where this does not divide the number of outputs.

No matter for an embedding: a tied head is computed in 4 bits, see `exporters.onnx.table`."""


@dataclass(frozen=True)
class Storage:
    """How ONNX holds the codes of a format.

    Attributes:
        bits: Width of the stored integers, 2, 4 or 8; a 3-bit format takes 4.
        group: Inputs that share a scale.
        negated: Codes and scales are stored with the other sign, because the levels reach further
            up than down (Q2_0: -1 .. 2).
        unsigned: Codes are unsigned and groups have zero points.
        number: What a code is.
        exponents: Scales are bytes of E8M0, not fp16.
        float_zeros: Zero points are fp16, which MatMulNBits alone can take.
    """

    bits: int
    group: int
    negated: bool = False
    unsigned: bool = False
    number: Number = "integer"
    exponents: bool = False
    float_zeros: bool = False

    @property
    def product_bits(self) -> int | None:
        """Bits in which ONNX Runtime multiplies by it; None if it expands it to floats."""
        if self.float_zeros:
            return None
        return {"integer": self.bits, "e2m1": 8, "e4m3": None}[self.number]


@dataclass(frozen=True)
class IntegerWeight:
    """A matrix ``w = scale * code`` or ``w = scale * (code - zero)``.

    Attributes:
        bits: Width of the stored codes.
        group: Inputs that share a scale.
        codes: int8 [out, in]; floating-point ones are places of levels, counted from the level 0.
        scales: float16 [out, groups], or uint8 exponents 2^(e - 128).
        zeros: Zero points of unsigned codes, int8 or float16 [out, groups]; None for signed ones.
        number: What a code is.
    """

    bits: int
    group: int
    codes: NDArray[np.int8]
    scales: Scales
    zeros: Zeros | None = None
    number: Number = "integer"

    def dequantize(self) -> NDArray[np.float32]:
        """float32 [out, in]; exact, as an fp16 scale times 8 bits fits into 24. With float zero
        points the product rounds once."""
        scales = np.repeat(scale_values(self.scales), self.group, axis=1)
        codes = self.codes.astype(np.float32)
        if self.number != "integer":
            levels = np.array(FLOATING[self.number], np.float32)
            codes = levels[self.codes.astype(np.int16) + len(levels) // 2]
        if self.zeros is not None:
            codes -= np.repeat(self.zeros.astype(np.float32), self.group, axis=1)
        return codes * scales


def scale_values(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """Scales in float32, from fp16 or exponents of E8M0, same shape."""
    if stored.dtype != np.uint8:
        return stored.astype(np.float32)
    return np.ldexp(np.float32(1), stored.astype(np.int32) - EXPONENT_OF_ONE).astype(np.float32)


def bit_patterns(places: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Sign and magnitude of floating-point codes: E2M1 and E4M3 count their magnitudes upwards.

    Args:
        places: Counted from the level 0, any shape.
        bits: 4 or 8.
    """
    sign = (places < 0).view(np.uint8) << np.uint8(bits - 1)
    return np.abs(places).view(np.uint8) | sign


def places(patterns: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    """The inverse of `bit_patterns`.

    Raises:
        VerificationError: A negative zero or NaN, which the formats leave out.
    """
    half = 1 << (bits - 1)
    magnitude = (patterns & np.uint8(half - 1)).astype(np.int8)
    if (patterns == half).any() or (bits == 8 and (magnitude == half - 1).any()):
        raise VerificationError("a floating-point code is a negative zero or not a number")
    return np.where(patterns < half, magnitude, -magnitude).astype(np.int8)


def storage_of(fmt: Format, shape: tuple[int, ...], name: str = "a matrix") -> Storage:
    """How ONNX holds a matrix of this format.

    Args:
        fmt: The format.
        shape: [out, in].
        name: Of the matrix, for errors.

    Raises:
        UnsupportedError: ONNX has no integers for the format, its groups would not be fused, or
            ONNX Runtime would compute something else.
    """
    found = _width(fmt)
    if found is None:
        raise UnsupportedError(
            f"type {fmt.name} cannot be stored in ONNX",
            why="a dequantized weight there is an fp16 scale times an integer of 2, 4 or 8 bits, "
            "E2M1 or E4M3",
            fix="use INT2_G64, INT3_G32, UINT4_G32, INT8_G32, FP4_G32, FP8_G32 and the like, or "
            "Q4_0, Q2_0, Q8_0, MXFP4",
        )
    bits, negated, number = found
    if len(shape) != 2:
        raise UnsupportedError(f"{name} of shape {shape} in {fmt.name}", why="it is not a matrix")
    outputs, inputs = shape
    group = fmt.group_of(inputs)
    known = GROUPS[bits if number == "integer" else 8]
    if not fmt.group_size or group not in known:
        raise UnsupportedError(
            f"groups of {group} in {name} at {bits} bits",
            why="ONNX Runtime has no fast kernel for them, or computes them wrongly",
            fix=f"use a group size of {', '.join(map(str, known))}",
        )
    if not fmt.fits(inputs):
        raise UnsupportedError(
            f"{name} has {inputs} inputs, which do not divide into groups of {group}",
            fix="use a smaller group size for this matrix",
        )
    float_zeros = fmt.zero_lattice is not None
    repacked = bits == 2 and name != EMBEDDING and not float_zeros
    if repacked and outputs % OUTPUTS_AT_2_BITS:
        raise UnsupportedError(
            f"{name} has {outputs} outputs, which 2 bits cannot hold in ONNX",
            why=f"ONNX Runtime computes 2-bit weights wrongly where {OUTPUTS_AT_2_BITS} does not "
            "divide their outputs",
            fix="use 3 or 4 bits for this matrix",
        )
    unsigned, exponents = fmt.scaled_offsets, fmt.scale_lattice is E8M0
    return Storage(bits, group, negated, unsigned, number, exponents, float_zeros)


def stored_bytes(fmt: Format, shape: tuple[int, ...], name: str, *, packed: bool = False) -> int:
    """Bytes of a matrix in the file, scales included.

    Args:
        fmt: The format.
        shape: [out, in].
        name: Hugging Face name; the zero points of an embedding fill whole bytes in every row.
        packed: 3 bits lie in planes, not in a container of 4.

    Raises:
        UnsupportedError: See `storage_of`.
    """
    storage = storage_of(fmt, shape, name)
    rows, width = shape
    groups = width // storage.group
    zeros = 0
    if storage.float_zeros:
        zeros = 2 * rows * groups
    elif storage.unsigned:
        together = 1 if name == EMBEDDING else rows
        zeros = rows // together * -(-together * groups * storage.bits // 8)
    bits = 3 if packed and len(fmt.levels) == 8 else storage.bits
    scales = rows * groups * (1 if storage.exponents else 2)
    return rows * width * bits // 8 + scales + zeros


def _width(fmt: Format) -> tuple[int, bool, Number] | None:
    """Smallest width that holds the levels, whether they are negated for it, and what they are;
    None if there is none."""
    low, high = int(fmt.levels[0]), int(fmt.levels[-1])
    plain = fmt.affine == fmt.scaled_offsets and fmt.sub_scale is None
    for number, levels in FLOATING.items():
        if plain and fmt.levels == levels and fmt.scale_lattice in (FP16, E8M0):
            return (4 if number == "e2m1" else 8), False, number
    plain = plain and fmt.scale_lattice == FP16
    if not plain or fmt.levels != tuple(float(level) for level in range(low, high + 1)):
        return None
    if fmt.scaled_offsets:
        return {4: 2, 8: 4, 16: 4, 256: 8}[len(fmt.levels)], False, "integer"
    # 5 to 7 bits would fill a byte just as 8 do: the file would not be what was asked for.
    for bits, fewest_levels in ((2, 1), (4, 5), (8, 129)):
        bottom, top = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        if len(fmt.levels) < fewest_levels:
            continue
        if bottom <= low and high <= top:
            return bits, False, "integer"
        if bottom <= -high and -low <= top and fmt.signed_scale:
            return bits, True, "integer"
    return None


def canonical(quantized: QuantizedTensor) -> QuantizedTensor:
    """The same weights with one code where several are the same: E8M0 has no scale 0, so that the
    codes of a group of zeros must be the level 0."""
    if quantized.format.scale_lattice is not E8M0:
        return quantized
    group = quantized.format.group_of(quantized.codes.shape[1])
    gone = (quantized.scales["d"] == 0).repeat_interleave(group, dim=1)
    zero = quantized.format.code_min + quantized.format.levels.index(0.0)
    codes = torch.where(gone, zero, quantized.codes).to(torch.int8)
    empty = (codes == zero).reshape(len(codes), -1, group).all(2)
    d = torch.where(empty, 0.0, quantized.scales["d"])
    return QuantizedTensor(quantized.format, codes, {"d": d})


def integer_weight(quantized: QuantizedTensor, name: str = "a matrix") -> IntegerWeight:
    """A solved matrix in ONNX's terms; nothing is rounded.

    Args:
        quantized: Codes and scales, see `storage_of` for the formats.
        name: Of the matrix, for errors.

    Raises:
        UnsupportedError: See `storage_of`.
        VerificationError: A code or a scale is none of the format.
    """
    quantized, fmt = canonical(quantized), quantized.format
    storage = storage_of(fmt, tuple(quantized.codes.shape), name)
    codes, d = quantized.codes.cpu().numpy(), quantized.scales["d"].cpu().numpy()
    if codes.min() < fmt.code_min or codes.max() >= fmt.code_min + len(fmt.levels):
        raise VerificationError(f"a code of {name} is none of {fmt.name}")
    scales = _stored_scales(d, storage, name)
    if storage.negated:
        codes, scales = -codes, -scales
    if storage.number != "integer":
        codes = codes.astype(np.int16) - _middle(fmt)
    zeros = _zeros(quantized, name) if storage.unsigned else None
    codes = codes.astype(np.int8)
    return IntegerWeight(storage.bits, storage.group, codes, scales, zeros, storage.number)


def _middle(fmt: Format) -> int:
    """Code of the level 0 of a floating-point format."""
    return fmt.code_min + len(fmt.levels) // 2


def _stored_scales(d: NDArray[np.float32], storage: Storage, name: str) -> Scales:
    """Float32 scales as fp16, or as exponents; 0 as the smallest of these."""
    if storage.exponents:
        exponents = np.where(d > 0, np.frexp(d)[1] + EXPONENT_OF_ONE - 1, 0)
        found = exponents.clip(0, 255).astype(np.uint8)
        if not np.array_equal(np.where(d == 0, 0, scale_values(found)), d):
            raise VerificationError(f"a scale of {name} is not a power of two in E8M0")
        return found
    with np.errstate(over="ignore"):
        scales = d.astype(np.float16)
    if not (np.isfinite(scales).all() and np.array_equal(scales.astype(np.float32), d)):
        raise VerificationError(f"a scale of {name} is not a finite number of fp16")
    return scales


def _zeros(quantized: QuantizedTensor, name: str) -> Zeros:
    d, m = quantized.scales["d"], quantized.scales["m"]
    zeros = zero_points(quantized.format, d, m)
    if not torch.equal(zero_offset(d, zeros), m):
        raise VerificationError(f"an offset of {name} is no zero point times its scale")
    kind = np.int8 if quantized.format.zero_points else np.float16
    found: Any = zeros.cpu().numpy().astype(kind)
    return found


def quantized_tensor(stored: IntegerWeight, fmt: Format, name: str = "a matrix") -> QuantizedTensor:
    """The inverse of `integer_weight`: codes and scales as the solver had them.

    Raises:
        UnsupportedError: See `storage_of`.
        VerificationError: The integers are not those of the format.
    """
    storage = storage_of(fmt, stored.codes.shape, name)
    groups = (stored.codes.shape[0], stored.codes.shape[1] // storage.group)
    found = (stored.bits, stored.group, stored.number, stored.scales.dtype == np.uint8)
    wanted = (storage.bits, storage.group, storage.number, storage.exponents)
    if found != wanted or stored.scales.shape != groups:
        raise VerificationError(
            f"{name} has {stored.bits} bits in groups of {stored.group}, which is not {fmt.name}"
        )
    sign = -1 if storage.negated else 1
    codes = sign * stored.codes.astype(np.int16)
    if storage.number != "integer":
        codes += _middle(fmt)
    if codes.min() < fmt.code_min or codes.max() >= fmt.code_min + len(fmt.levels):
        raise VerificationError(f"a code of {name} is none of {fmt.name}")
    fields = {"d": torch.from_numpy(sign * scale_values(stored.scales))}
    if not fields["d"].isfinite().all() or (not fmt.signed_scale and (fields["d"] < 0).any()):
        raise VerificationError(f"a scale of {name} is none of {fmt.name}")
    if storage.unsigned:
        if stored.zeros is None or (stored.zeros.shape, stored.zeros.dtype == np.float16) != (
            groups,
            storage.float_zeros,
        ):
            raise VerificationError(f"{name} has no zero point for each of its groups")
        zeros = torch.from_numpy(stored.zeros).float()
        if fmt.zero_lattice is not None and not torch.equal(fmt.zero_lattice.round(zeros), zeros):
            raise VerificationError(f"a zero point of {name} is none of {fmt.name}")
        fields["m"] = zero_offset(fields["d"], zeros)
    return canonical(QuantizedTensor(fmt, torch.from_numpy(codes.astype(np.int8)), fields))
