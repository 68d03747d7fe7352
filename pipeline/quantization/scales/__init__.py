"""Scale rules by name."""

from __future__ import annotations

from pipeline.quantization.scales.absmax import absmax
from pipeline.quantization.scales.base import BlockScales, ScaleRule
from pipeline.quantization.scales.piso import piso

SCALE_RULES = {"absmax": absmax, "piso": piso}

__all__ = ["SCALE_RULES", "BlockScales", "ScaleRule", "absmax", "piso"]
