"""The figures of a quality run as Markdown."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks.variants import FORMATS, variants


def render(path: Path) -> str:
    """One table a format: rows are methods with their scale rules."""
    figures = json.loads(path.read_text(encoding="utf-8"))
    lines = [f"full precision: perplexity {figures['full precision']['ppl']:.2f}"]
    for fmt in FORMATS:
        rows = []
        for variant in variants():
            cell = figures.get(f"{fmt} | {variant.name}")
            if cell:
                rows.append(
                    f"| {variant.method} | {variant.scales} | {cell['loss']:.5f} "
                    f"| {cell['ppl']:.2f} |"
                )
        if rows:
            lines += ["", f"**{fmt}**", "", "| method | scales | layer loss | perplexity |"]
            lines += ["| --- | --- | --- | --- |", *rows]
    return "\n".join(lines)
