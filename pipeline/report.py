"""What a run found out: the parity ladder, the quality figures, and what is in the output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import QualityGateError, VerificationError
from pipeline.json_text import json_text

QUALITY_LEVEL = "quality"
"""The one level of the ladder that judges the recipe, not the file."""

Status = Literal["green", "red", "not run"]


@dataclass(frozen=True)
class Gate:
    """One rung of the parity ladder.

    Attributes:
        level: ``transform``, ``bytes``, ``tokens``, ``twin``, ``kernels``, ``deployed`` or
            ``quality``.
        claim: What is true if the gate is green.
        runtime: What ran the file.
        figure: The measured value, or a verdict such as ``identical``; None if not run.
        limit: The condition that the figure must meet, for people.
        status: The verdict.
        detail: Why it is red or was not run.
    """

    level: str
    claim: str
    runtime: str
    figure: float | str | None
    limit: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Quality:
    """Quantized against full precision in one runtime and protocol.

    Attributes:
        protocol: How perplexity is measured.
        runtime: What ran the quantized file.
        reference_ppl: Perplexity in full precision.
        reference_se: Its standard error.
        ppl: Perplexity quantized.
        se: Its standard error.
        d_ln_ppl: ln(ppl / reference_ppl), paired over tokens.
        d_ln_ppl_se: Its standard error.
        kld_mean: Mean KL divergence from the reference, nats per token.
        kld_p999: Its 99.9 % quantile.
        top1: Share of tokens where both rank the same token first.
    """

    protocol: str
    runtime: str
    reference_ppl: float
    reference_se: float
    ppl: float
    se: float
    d_ln_ppl: float
    d_ln_ppl_se: float
    kld_mean: float | None = None
    kld_p999: float | None = None
    top1: float | None = None


def _quality(data: Mapping[str, Any]) -> Quality:
    """A row from plain data, where null stands for a figure that is not a number."""
    optional = ("kld_mean", "kld_p999", "top1")
    values: dict[str, Any] = {
        k: math.nan if v is None and k not in optional else v for k, v in data.items()
    }
    return Quality(**values)


@dataclass(frozen=True)
class OutputFile:
    """A file of the output folder: name, size in bytes, SHA-256 in hexadecimal."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Report:
    """Everything that a run or a verification found out.

    Attributes:
        gates: The parity ladder, bottom up.
        qualities: Quantized against full precision, a row for each protocol and runtime.
        files: Content of the output folder.
        bits_per_weight: Of the whole model file, embeddings and head included.
        size_bytes: Size of the model file.
        counts: How often something was done differently from what was asked, by kind.
        notes: What else a reader should know (known deviations).
        timings: Seconds by stage.
        memory_peak_bytes: Peak resident memory.
        output: The output folder, or None if nothing was delivered.
    """

    gates: tuple[Gate, ...] = ()
    qualities: tuple[Quality, ...] = ()
    files: tuple[OutputFile, ...] = ()
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    memory_peak_bytes: int | None = None
    output: Path | None = None

    def red(self) -> tuple[Gate, ...]:
        """The gates that failed."""
        return tuple(gate for gate in self.gates if gate.status == "red")

    @property
    def exit_code(self) -> int:
        """0, or the status of the worst red gate: parity before quality."""
        levels = {gate.level for gate in self.red()}
        if levels - {QUALITY_LEVEL}:
            return VerificationError.exit_code
        return QualityGateError.exit_code if levels else 0

    def to_dict(self) -> dict[str, Any]:
        """All fields and the exit code as nested plain data."""
        return {**asdict(self), "exit_code": self.exit_code}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        values = {key: value for key, value in data.items() if key != "exit_code"}
        return cls(
            **values
            | {
                "gates": tuple(Gate(**gate) for gate in values["gates"]),
                "qualities": tuple(_quality(quality) for quality in values["qualities"]),
                "files": tuple(OutputFile(**file) for file in values["files"]),
                "notes": tuple(values["notes"]),
                "output": None if values["output"] is None else Path(values["output"]),
            }
        )

    def to_json(self) -> str:
        """`to_dict` as indented JSON; figures that are not finite are null."""
        return json_text(self.to_dict(), indent=2)
