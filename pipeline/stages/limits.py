"""The verdict on a figure that must stay below a limit."""

from __future__ import annotations

from pipeline.report import Gate


def limit_gate(
    level: str, claim: str, runtime: str, measure: str, figure: float, limit: float, why: str = ""
) -> Gate:
    """A gate that is green if the figure is below the limit; one that is not a number is red.

    Args:
        level: Rung of the ladder.
        claim: What is true if the gate is green.
        runtime: What was measured.
        measure: What the figure is, for people.
        figure: The measured value.
        limit: Must be larger.
        why: What a reader of a red gate should know.
    """
    passed = figure < limit
    return Gate(
        level=level,
        claim=claim,
        runtime=runtime,
        figure=figure,
        limit=f"{measure} < {limit:g}",
        status="green" if passed else "red",
        detail="" if passed else why,
    )
