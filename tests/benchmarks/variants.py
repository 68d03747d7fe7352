"""The methods and scale rules that the quality table compares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.quantization.layer import LayerOptions
from pipeline.stages.mismatch_share import Estimate

GROUPS = ("_G32", "_G128", "")
FORMATS = tuple(f"INT{bits}{group}" for bits in (2, 3, 4) for group in GROUPS)

REFINE_ROUNDS = 6

PUBLISHED = LayerOptions(signed=False, metric="block", activation_order=True)
"""What the published methods leave out: negative scales and the Schur metric."""


@dataclass(frozen=True)
class Variant:
    """One row and column of the table.

    Attributes:
        method: RTN, GPTQ, Qronos or CoreQ.
        scales: Name of the column.
        options: How layers are quantized.
        estimate: Estimate of the share of the mismatch correction.
    """

    method: str
    scales: str
    options: LayerOptions
    estimate: Estimate = "fixed"

    @property
    def name(self) -> str:
        """Method and scales."""
        return f"{self.method} {self.scales}"


def _nearest(mismatch: float = 0.0) -> Iterator[Variant]:
    base = replace(PUBLISHED, rounding="nearest", mismatch=mismatch)
    grouped = replace(base, rounding="groupwise")
    yield Variant("RTN", "absmax", replace(base, scales="absmax", signed=True))
    yield Variant("RTN", "mse", replace(base, scales="mse", signed=True))
    yield Variant("RTN", "PiSO data-free", replace(base, hessian="identity"))
    yield Variant("RTN", "PiSO diagonal", replace(base, hessian="diagonal"))
    yield Variant("RTN", "PiSO_I", base)
    yield Variant("RTN", "PiSO_S", grouped)
    yield Variant("RTN", "PiSO_S signed", replace(grouped, signed=True))
    yield Variant("RTN", "cyclic signed", replace(grouped, signed=True, passes=3))
    full = replace(grouped, signed=True, refine_rounds=REFINE_ROUNDS)
    yield Variant("RTN", "full chain", full)


def _corrected(method: str, mismatch: float, estimate: Estimate) -> Iterator[Variant]:
    base = replace(PUBLISHED, mismatch=mismatch)
    ours = replace(base, signed=True, metric="schur")

    def variant(scales: str, options: LayerOptions) -> Variant:
        return Variant(method, scales, options, estimate)

    yield variant("absmax", replace(base, scales="absmax", signed=True))
    yield variant("PiSO_S by layer", replace(base, interleave="layer"))
    yield variant("PiSO by group", base)
    yield variant("proxy by group", replace(base, scales="proxy"))
    yield variant("PiSO signed Schur", ours)
    yield variant("full chain", replace(ours, refine_rounds=REFINE_ROUNDS))
    ahead = replace(ours, scales="lookahead")
    yield variant("look-ahead", ahead)
    yield variant("full chain, look-ahead", replace(ahead, refine_rounds=REFINE_ROUNDS))


def variants() -> list[Variant]:
    """All of them. By layer and by group are as published: positive, in the metric of H's block."""
    return [
        *_nearest(),
        *_corrected("GPTQ", 0.0, "fixed"),
        *_corrected("Qronos", 1.0, "fixed"),
        *_corrected("CoreQ", 1.0, "split-halves"),
    ]
