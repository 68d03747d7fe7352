"""Quantized weights as ONNX holds them: integers of 2, 4 or 8 bits, fp16 scales, zero points.

Symmetric formats are two's complement integers, formats with zero points unsigned ones.

ONNX has no 3-bit type: 3-bit codes lie in a 4-bit container. MatMulNBits, which ONNX Runtime makes
of a dequantized weight and its product, knows no other widths either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from exporters.onnx.names import EMBEDDING, GROUPS
from pipeline.errors import UnsupportedError, VerificationError
from pipeline.quantization.formats import Format, QuantizedTensor, zero_offset, zero_points

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
    """

    bits: int
    group: int
    negated: bool = False
    unsigned: bool = False


@dataclass(frozen=True)
class IntegerWeight:
    """A matrix ``w = scale * code`` or ``w = scale * (code - zero)``.

    Attributes:
        bits: Width of the stored integers.
        group: Inputs that share a scale.
        codes: int8 [out, in].
        scales: float16 [out, groups].
        zeros: Zero points of unsigned codes, int8 [out, groups]; None for signed ones.
    """

    bits: int
    group: int
    codes: NDArray[np.int8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.int8] | None = None

    def dequantize(self) -> NDArray[np.float32]:
        """float32 [out, in]; exact, as an fp16 scale times 8 bits fits into 24."""
        scales = np.repeat(self.scales.astype(np.float32), self.group, axis=1)
        codes = self.codes.astype(np.float32)
        if self.zeros is not None:
            codes -= np.repeat(self.zeros.astype(np.float32), self.group, axis=1)
        return codes * scales


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
            why="a dequantized weight there is an fp16 scale times an integer of 2, 4 or 8 bits",
            fix="use INT2_G64, INT3_G32, UINT4_G32, INT8_G32 and the like, or Q4_0, Q2_0, Q8_0",
        )
    bits, negated = found
    if len(shape) != 2:
        raise UnsupportedError(f"{name} of shape {shape} in {fmt.name}", why="it is not a matrix")
    outputs, inputs = shape
    group = fmt.group_of(inputs)
    if not fmt.group_size or group not in GROUPS[bits]:
        raise UnsupportedError(
            f"groups of {group} in {name} at {bits} bits",
            why="ONNX Runtime has no fast kernel for them, or computes them wrongly",
            fix=f"use a group size of {', '.join(map(str, GROUPS[bits]))}",
        )
    if not fmt.fits(inputs):
        raise UnsupportedError(
            f"{name} has {inputs} inputs, which do not divide into groups of {group}",
            fix="use a smaller group size for this matrix",
        )
    if bits == 2 and outputs % OUTPUTS_AT_2_BITS and name != EMBEDDING:
        raise UnsupportedError(
            f"{name} has {outputs} outputs, which 2 bits cannot hold in ONNX",
            why=f"ONNX Runtime computes 2-bit weights wrongly where {OUTPUTS_AT_2_BITS} does not "
            "divide their outputs",
            fix="use 3 or 4 bits for this matrix",
        )
    return Storage(bits, group, negated, fmt.zero_points)


def row_bytes(fmt: Format, width: int, *, packed: bool = False) -> int:
    """Bytes of a row of `width` inputs, scales included.

    Args:
        fmt: The format.
        width: Inputs.
        packed: 3 bits lie in planes, not in a container of 4.

    Raises:
        UnsupportedError: See `storage_of`.
    """
    storage = storage_of(fmt, (OUTPUTS_AT_2_BITS, width))
    groups = width // storage.group
    zeros = -(-groups * storage.bits // 8) if storage.unsigned else 0
    bits = 3 if packed and len(fmt.levels) == 8 else storage.bits
    return width * bits // 8 + 2 * groups + zeros


def _width(fmt: Format) -> tuple[int, bool] | None:
    """Smallest width that holds the levels, and whether they are negated for it; None if none."""
    low, high = int(fmt.levels[0]), int(fmt.levels[-1])
    plain = fmt.affine == fmt.zero_points and fmt.sub_scale is None
    plain = plain and fmt.scale_lattice.name == "fp16"
    if not plain or fmt.levels != tuple(float(level) for level in range(low, high + 1)):
        return None
    if fmt.zero_points:
        return {4: 2, 8: 4, 16: 4, 256: 8}[len(fmt.levels)], False
    # 5 to 7 bits would fill a byte just as 8 do: the file would not be what was asked for.
    for bits, fewest_levels in ((2, 1), (4, 5), (8, 129)):
        bottom, top = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        if len(fmt.levels) < fewest_levels:
            continue
        if bottom <= low and high <= top:
            return bits, False
        if bottom <= -high and -low <= top and fmt.signed_scale:
            return bits, True
    return None


def integer_weight(quantized: QuantizedTensor, name: str = "a matrix") -> IntegerWeight:
    """A solved matrix in ONNX's terms; nothing is rounded.

    Args:
        quantized: Codes and scales, see `storage_of` for the formats.
        name: Of the matrix, for errors.

    Raises:
        UnsupportedError: See `storage_of`.
        VerificationError: A code or a scale is none of the format.
    """
    fmt = quantized.format
    storage = storage_of(fmt, tuple(quantized.codes.shape), name)
    codes, d = quantized.codes.cpu().numpy(), quantized.scales["d"].cpu().numpy()
    if codes.min() < fmt.code_min or codes.max() >= fmt.code_min + len(fmt.levels):
        raise VerificationError(f"a code of {name} is none of {fmt.name}")
    with np.errstate(over="ignore"):
        scales = d.astype(np.float16)
    if not (np.isfinite(scales).all() and np.array_equal(scales.astype(np.float32), d)):
        raise VerificationError(f"a scale of {name} is not a finite number of fp16")
    if storage.negated:
        codes, scales = -codes, -scales
    zeros = _zeros(quantized, name) if storage.unsigned else None
    return IntegerWeight(storage.bits, storage.group, codes.astype(np.int8), scales, zeros)


def _zeros(quantized: QuantizedTensor, name: str) -> NDArray[np.int8]:
    d, m = quantized.scales["d"], quantized.scales["m"]
    zeros = zero_points(quantized.format, d, m)
    if not torch.equal(zero_offset(d, zeros), m):
        raise VerificationError(f"an offset of {name} is no integer zero point")
    found: NDArray[np.int8] = zeros.cpu().numpy().astype(np.int8)
    return found


def quantized_tensor(stored: IntegerWeight, fmt: Format, name: str = "a matrix") -> QuantizedTensor:
    """The inverse of `integer_weight`: codes and scales as the solver had them.

    Raises:
        UnsupportedError: See `storage_of`.
        VerificationError: The integers are not those of the format.
    """
    storage = storage_of(fmt, stored.codes.shape, name)
    groups = (stored.codes.shape[0], stored.codes.shape[1] // storage.group)
    if (stored.bits, stored.group) != (storage.bits, storage.group) or (
        stored.scales.shape != groups
    ):
        raise VerificationError(
            f"{name} has {stored.bits} bits in groups of {stored.group}, which is not {fmt.name}"
        )
    sign = -1 if storage.negated else 1
    codes = sign * stored.codes.astype(np.int16)
    if codes.min() < fmt.code_min or codes.max() >= fmt.code_min + len(fmt.levels):
        raise VerificationError(f"a code of {name} is none of {fmt.name}")
    fields = {"d": torch.from_numpy(sign * stored.scales.astype(np.float32))}
    if storage.unsigned:
        if stored.zeros is None or stored.zeros.shape != groups:
            raise VerificationError(f"{name} has no zero point for each of its groups")
        fields["m"] = zero_offset(fields["d"], torch.from_numpy(stored.zeros).float())
    return QuantizedTensor(fmt, torch.from_numpy(codes.astype(np.int8)), fields)
