"""Tables that stand for what ONNX Runtime's CPU provider does not compute: E2M1 and E8M0.

A Gather of a constant table by constant codes is folded as the file is loaded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.onnx.graph_builder import GraphBuilder
from exporters.onnx.integers import scale_values
from pipeline.quantization.formats import E2M1_LEVELS


def doubled_e2m1(
    build: GraphBuilder, patterns: ir.Value, dtype: type[np.generic], name: str
) -> ir.Value:
    """Twice the values of E2M1, in a type that holds them.

    Args:
        build: Graph under construction.
        patterns: Sign and magnitude, UINT4 or UINT8, any shape.
        dtype: Of the values, int8 or float32.
        name: Of the nodes.
    """
    upwards = list(E2M1_LEVELS[len(E2M1_LEVELS) // 2 :])
    values = build.constant([*upwards, *(-value for value in upwards)], dtype)
    return _looked_up(build, values, patterns, name)


def powers(build: GraphBuilder, exponents: ir.Value, name: str) -> ir.Value:
    """Scales of E8M0, float32: ``2^(e - 128)`` of every uint8 e, for doubled levels."""
    every = scale_values(np.arange(256, dtype=np.uint8))
    values = build.table("constant.powers_of_two", every)
    return _looked_up(build, values, exponents, name)


def _looked_up(build: GraphBuilder, values: ir.Value, codes: ir.Value, name: str) -> ir.Value:
    indices = build.op("Cast", codes, name=f"{name}.indices", to=ir.DataType.INT32)
    return build.op("Gather", values, indices, name=f"{name}.values")
