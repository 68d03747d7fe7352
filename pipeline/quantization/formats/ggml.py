"""The block formats of ggml that are stored as codes and fp16 scales (ggml-common.h)."""

from __future__ import annotations

from pipeline.quantization.formats.base import Format
from pipeline.quantization.formats.lattice import FP16


def _symmetric(name: str, low: int, high: int, group: int, block_bytes: int) -> Format:
    return Format(
        name=name,
        levels=tuple(float(v) for v in range(low, high + 1)),
        group_size=group,
        super_group=group,
        affine=False,
        signed_scale=True,
        scale_lattice=FP16,
        bits_per_weight=8 * block_bytes / group,
        code_min=low,
    )


Q2_0 = _symmetric("Q2_0", -1, 2, group=64, block_bytes=18)
Q4_0 = _symmetric("Q4_0", -8, 7, group=32, block_bytes=18)
Q5_0 = _symmetric("Q5_0", -16, 15, group=32, block_bytes=22)
Q8_0 = _symmetric("Q8_0", -127, 127, group=32, block_bytes=34)
Q4_1 = Format(
    name="Q4_1",
    levels=tuple(float(v) for v in range(16)),
    group_size=32,
    super_group=32,
    affine=True,
    signed_scale=True,
    scale_lattice=FP16,
    bits_per_weight=5.0,
)
Q6_K = Format(
    name="Q6_K",
    levels=tuple(float(v) for v in range(-32, 32)),
    group_size=16,
    super_group=256,
    affine=False,
    signed_scale=True,
    scale_lattice=FP16,
    bits_per_weight=6.5625,
    code_min=-32,
    sub_scale=(-128, 127),
)

GGML_FORMATS: dict[str, Format] = {f.name: f for f in (Q2_0, Q4_0, Q4_1, Q5_0, Q8_0, Q6_K)}
