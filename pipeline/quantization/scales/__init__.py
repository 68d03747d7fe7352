"""Scale rules by name."""

from __future__ import annotations

from pipeline.quantization.scales.absmax import absmax
from pipeline.quantization.scales.base import BlockProblem, BlockScales, ScaleRule
from pipeline.quantization.scales.lookahead import lookahead
from pipeline.quantization.scales.mse import mse
from pipeline.quantization.scales.piso import piso
from pipeline.quantization.scales.proxy import proxy_static

SCALE_RULES = {
    "absmax": absmax,
    "lookahead": lookahead,
    "mse": mse,
    "piso": piso,
    "proxy": proxy_static,
}

__all__ = [
    "SCALE_RULES",
    "BlockProblem",
    "BlockScales",
    "ScaleRule",
    "absmax",
    "lookahead",
    "mse",
    "piso",
    "proxy_static",
]
