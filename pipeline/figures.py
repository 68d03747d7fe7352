"""Figures as texts, the same in tables, cards and messages."""

from __future__ import annotations

from pipeline.report import Gate, Quality


def with_error(value: float, error: float) -> str:
    """A value and its standard error: ``50.13±0.52``."""
    return f"{value:.4g}±{error:.2g}" if value >= 1000 else f"{value:.2f}±{error:.2f}"


def signed_with_error(value: float, error: float) -> str:
    """A small signed difference and its standard error: ``+0.0123±0.0008``."""
    return f"{value:+.4f}±{error:.4f}"


def kl(value: float | None) -> str:
    """A KL divergence in nats: ``0.00123``; a dash if it was not measured."""
    return "-" if value is None else f"{value:.3g}"


def share(value: float | None) -> str:
    """A share as a percentage; a dash if it was not measured."""
    return "-" if value is None else f"{value:.1%}"


def size(nbytes: int) -> str:
    """A file size in decimal units: ``2.41 MB``."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def gate_figure(gate: Gate) -> str:
    """A gate's figure: ``1.2e-06``, a verdict, or a dash if it was not run."""
    if gate.figure is None:
        return "-"
    return gate.figure if isinstance(gate.figure, str) else f"{gate.figure:.2g}"


QUALITY_COLUMNS = (
    "protocol",
    "runtime",
    "reference",
    "quantized",
    "ln ratio",
    "KLD",
    "99.9 %",
    "top-1",
)


def quality_row(quality: Quality) -> tuple[str, ...]:
    """A quality row's cells, one for each of `QUALITY_COLUMNS`."""
    return (
        quality.protocol,
        quality.runtime,
        with_error(quality.reference_ppl, quality.reference_se),
        with_error(quality.ppl, quality.se),
        signed_with_error(quality.d_ln_ppl, quality.d_ln_ppl_se),
        kl(quality.kld_mean),
        kl(quality.kld_p999),
        share(quality.top1),
    )


GATE_COLUMNS = ("level", "claim", "runtime", "figure", "limit", "status")


def gate_row(gate: Gate) -> tuple[str, ...]:
    """A gate's cells, one for each of `GATE_COLUMNS`; the detail follows the claim."""
    claim = f"{gate.claim} ({gate.detail})" if gate.detail else gate.claim
    return (gate.level, claim, gate.runtime, gate_figure(gate), gate.limit, gate.status)
