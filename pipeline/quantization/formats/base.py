"""What a quantized number format is, and what solvers return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pipeline.quantization.formats.codebook import Codebook
from pipeline.quantization.formats.lattice import ScaleLattice

SUPER_FIELDS = ("d", "dmin")
"""Stored fields that have one value a super-group; all others have one a group."""


@dataclass(frozen=True)
class Format:
    """A block format: ``w = scale * level`` or ``w = scale * level + offset``.

    Attributes:
        name: Upper-case name; ggml names for ggml types, ``INT3_G128`` style for research formats.
        levels: Representable values at scale 1, strictly increasing.
        group_size: Consecutive inputs that share one scale; 0 means the whole row (channel-wise).
        super_group: Consecutive inputs that share a super-scale; equals `group_size` without one.
        affine: The group also stores an offset in the same lattice as its scale.
        signed_scale: The scale may be negative, a free gain on asymmetric grids.
        scale_lattice: Values that the stored (super-)scale can take.
        bits_per_weight: Storage cost including scales (channel-wise: without the scales).
        code_min: Code of the first level; `levels[code - code_min]` is the level of a code.
        sub_scale: Inclusive integer range of a group's sub-scale under the super-scale, if any.
        sub_offset: Inclusive integer range of a group's offset in units of a super-offset, which is
            subtracted; affine formats without one store an offset a group.
        zero_points: The offset of an affine format is ``-scale * z`` with an integer z among the
            codes, as ONNX stores it, and not on the lattice.
        zero_lattice: Likewise with z on this lattice instead of an integer, see `FLOAT_ZEROS`.
        sub_step: Spacing of the sub-scales in their range.
        codebook: Which codes may stand side by side; None if all may.
        storage_block: Inputs that a file stores together, where that is more than `super_group`.
        tensor_scale: Power of two in all scales of a tensor, which a file stores once beside them;
            `scale_lattice` has it in. None for formats without one.
    """

    name: str
    levels: tuple[float, ...]
    group_size: int
    super_group: int
    affine: bool
    signed_scale: bool
    scale_lattice: ScaleLattice
    bits_per_weight: float
    code_min: int = 0
    sub_scale: tuple[int, int] | None = None
    sub_offset: tuple[int, int] | None = None
    zero_points: bool = False
    zero_lattice: ScaleLattice | None = None
    sub_step: int = 1
    codebook: Codebook | None = None
    storage_block: int = 0
    tensor_scale: float | None = None

    @cached_property
    def grid(self) -> Tensor:
        """Levels as a float64 tensor [levels]."""
        return torch.tensor(self.levels, dtype=torch.float64)

    def group_of(self, width: int) -> int:
        """Group size for rows of `width` inputs (resolves channel-wise)."""
        return self.group_size or width

    def block_of(self, width: int) -> int:
        """Inputs that must stay together: the super-group, or the whole row if channel-wise."""
        return self.super_group or width

    def stored_block(self, width: int) -> int:
        """Inputs of which a row of `width` must be a multiple."""
        return self.storage_block or self.block_of(width)

    def at_tensor_scale(self, scale: float) -> Format:
        """The same format with another scale of the whole tensor.

        A power of two keeps weights exact in float32 (for NVFP4: 4 significant bits of a scale by 2
        of a level), so that a runtime may multiply outputs by it as well as weights.

        Raises:
            ValueError: The format has none, or `scale` is not a power of two.
        """
        ratio, exponent = math.frexp(scale / (self.tensor_scale or math.nan))
        if ratio != 0.5:
            raise ValueError(f"{self.name} cannot have the tensor scale {scale!r}")
        shifted = self.scale_lattice.shifted(exponent - 1)
        return replace(self, tensor_scale=scale, scale_lattice=shifted)

    @property
    def vector(self) -> int:
        """Consecutive inputs that are rounded together: one without a codebook."""
        return 1 if self.codebook is None else self.codebook.unit

    @property
    def scaled_offsets(self) -> bool:
        """Whether an offset is a zero point times the scale."""
        return self.zero_points or self.zero_lattice is not None

    def positive(self) -> Format:
        """The same format without negative (super-)scales and sub-scales, if it has sub-scales.

        Others are told by the rules' ``signed``: their lattice may also hold offsets.
        """
        if self.sub_scale is None:
            return self
        return replace(
            self,
            sub_scale=(max(0, self.sub_scale[0]), self.sub_scale[1]),
            scale_lattice=replace(self.scale_lattice, signed=False),
        )

    def fits(self, width: int) -> bool:
        """Whether rows of `width` inputs divide into whole blocks."""
        return width > 0 and width % self.stored_block(width) == 0


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and scales of one linear, exactly as the format stores them.

    Attributes:
        format: The format of all its groups.
        codes: int8 [out, in].
        scales: The stored fields. ``d`` float32 [out, super-groups] on the scale lattice; with
            sub-scales ``sc`` int8 [out, groups]. Affine formats have ``m`` float32 [out, groups],
            or ``dmin`` float32 [out, super-groups] and ``mn`` int8 [out, groups].
    """

    format: Format
    codes: Tensor
    scales: Mapping[str, Tensor]

    def group_scales(self) -> Tensor:
        """Effective scale of each group, float32 [out, groups]."""
        return group_scales(self.format, self.scales)

    def group_offsets(self) -> Tensor | None:
        """Effective offset of each group, float32 [out, groups]; None without offsets."""
        return group_offsets(self.format, self.scales)

    def dequantize(self) -> Tensor:
        """Weights that the runtime computes with, float32 [out, in], bit for bit.

        Products of an fp16 scale, a sub-scale and a code are exact in float32 (24 bits at most), so
        the order of the multiplications in the runtime does not matter; the one addition of affine
        formats rounds once, fused or not.
        """
        width = self.codes.shape[1]
        group = self.format.group_of(width)
        levels = self.format.grid.float().to(self.codes.device)
        values = levels[self.codes.long() - self.format.code_min]
        values = values * self.group_scales().repeat_interleave(group, dim=1)
        offsets = self.group_offsets()
        if offsets is not None:
            values = values + offsets.repeat_interleave(group, dim=1)
        return values


def stored_pair(fmt: Format, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Wanted scales and offsets of a format without sub-scales as it can store them, any shape."""
    scale = fmt.scale_lattice.round(carrying(fmt, scale, offset))
    if not fmt.scaled_offsets:
        return scale, fmt.scale_lattice.round(offset)
    return scale, zero_offset(scale, zero_points(fmt, scale, offset))


def carrying(fmt: Format, scale: Tensor, offset: Tensor) -> Tensor:
    """Scales that are large enough for float zero points to reach the offsets, same shape: weights
    that are all alike have nearly no scale. Other formats' scales as they are."""
    if fmt.zero_lattice is None:
        return scale
    smallest = 2.0**fmt.scale_lattice.min_step_exponent
    least = (1.001 * offset.abs() / fmt.zero_lattice.max_value).clamp_min(smallest)
    least = torch.where(offset == 0, 0.0, least)
    return torch.where(scale < 0, -1.0, 1.0) * torch.maximum(scale.abs(), least)


def zero_points(fmt: Format, scale: Tensor, offset: Tensor) -> Tensor:
    """The zero points nearest to ``-offset / scale``, integers or on the format's lattice, same
    shape and dtype; 0 where the scale is 0."""
    ratio = torch.where(scale == 0, 0.0, -offset / torch.where(scale == 0, 1.0, scale))
    if fmt.zero_lattice is not None:
        return fmt.zero_lattice.round(ratio)
    return ratio.round().clamp(0, len(fmt.levels) - 1)


def zero_offset(scale: Tensor, zero: Tensor) -> Tensor:
    """``-scale * zero`` without a negative 0, exact for fp16 values even in float32."""
    return 0.0 - scale * zero


def group_scales(fmt: Format, fields: Mapping[str, Tensor]) -> Tensor:
    """Effective scale of each group, [rows, groups], in the dtype of the (super-)scale.

    Args:
        fmt: The format.
        fields: Its stored fields, see `QuantizedTensor.scales`.
    """
    if fmt.sub_scale is None:
        return fields["d"]
    return _times(fields["d"], fields["sc"])


def group_offsets(fmt: Format, fields: Mapping[str, Tensor]) -> Tensor | None:
    """Effective offset of each group, likewise; None without offsets."""
    if not fmt.affine:
        return None
    if fmt.sub_offset is None:
        return fields["m"]
    return -_times(fields["dmin"], fields["mn"])


def _times(super_values: Tensor, factors: Tensor) -> Tensor:
    """Values of super-groups spread over their groups, times each group's integer."""
    per_super = factors.shape[1] // super_values.shape[1]
    return super_values.repeat_interleave(per_super, dim=1) * factors.to(super_values.dtype)
