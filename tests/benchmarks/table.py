"""The figures of a quality run as Markdown."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.variants import FORMATS, GROUPS, variants


def render(path: Path) -> str:
    """One table a group size: rows are methods with their scale rules, columns are widths."""
    figures = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"full precision: perplexity {figures['full precision']['ppl']:.2f}"]
    for group in GROUPS:
        formats = [f for f in FORMATS if f.partition("_")[2] == group.lstrip("_")]
        rows = []
        for variant in variants():
            cells = [figures.get(f"{f} | {variant.name}") for f in formats]
            if any(cells):
                shown = " | ".join(_figures(cell) for cell in cells)
                rows.append(f"| {variant.method} | {variant.scales} | {shown} |")
        if rows:
            heads = " | ".join(f"{f} loss | ppl" for f in formats)
            lines += ["", f"| method | scales | {heads} |"]
            lines += ["| --- " * (2 + 2 * len(formats)) + "|", *rows]
    return "\n".join(lines)


def _figures(cell: dict[str, float] | None) -> str:
    if cell is None:
        return " | "
    ppl = cell["ppl"]
    return f"{cell['loss']:.5f} | {f'{ppl:.0e}' if ppl >= 10000 else f'{ppl:.2f}'}"
