"""The model card: a README.md that says what the file is, how it was made, and what it was put to.

Layout of the front matter: the Hugging Face hub's model card metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePath

from pipeline import figures
from pipeline.recipe import Recipe
from pipeline.recipe_files import to_toml
from pipeline.report import Report

METHODS = ("piso", "gptq")
"""Tags of a model that was quantized here."""

WEIGHTED = ("piso", "imatrix")
"""Tags of one that was quantized under an importance matrix: no error was fed forward."""


def render_card(
    report: Report,
    recipe: Recipe,
    command: str,
    base_model: str | None,
    license_name: str | None = None,
    methods: tuple[str, ...] = METHODS,
) -> str:
    """The model card in Markdown with YAML front matter.

    Args:
        report: What the run found out.
        recipe: As resolved.
        command: The exact command line.
        base_model: Hub id of the model that was quantized; None if it has none.
        license_name: The base model's license, carried over.
        methods: Tags that say how it was quantized.
    """
    name = base_model or PurePath(recipe.model or "demo model").name
    sections = (
        _front_matter(recipe, base_model, license_name, methods),
        f"# {_line(name)}, {recipe.label} {' and '.join(recipe.targets).upper()}",
        _introduction(report, name, recipe),
        _table("Quality", figures.QUALITY_COLUMNS, map(figures.quality_row, report.qualities)),
        _table("Parity with PyTorch", figures.GATE_COLUMNS, map(figures.gate_row, report.gates)),
        _deviations(report),
        f"## Command\n\n{_fenced(command, 'sh')}",
        f"## Recipe\n\n{_fenced(to_toml(recipe).strip(), 'toml')}",
        _files(report),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(
    recipe: Recipe, base_model: str | None, license_name: str | None, methods: tuple[str, ...]
) -> str:
    lines = ["---"]
    if base_model:
        # JSON strings are YAML strings, whatever characters they hold.
        lines += [f"base_model: {json.dumps(base_model)}", "base_model_relation: quantized"]
    if license_name:
        lines.append(f"license: {json.dumps(license_name)}")
    lines += [
        f"library_name: {recipe.targets[0]}",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join((*recipe.targets, 'quantized', json.dumps(recipe.label), *methods))}]",
        "---",
    ]
    return "\n".join(lines)


def _introduction(report: Report, name: str, recipe: Recipe) -> str:
    kinds = f"types chosen for {recipe.label}" if recipe.budgeted else recipe.weight_type
    facts = [f"{_line(name)} with decoder weights in {kinds}"]
    if report.bits_per_weight is not None:
        facts.append(f"{report.bits_per_weight:.3f} bits per weight over the whole file")
    if report.size_bytes is not None:
        facts.append(figures.size(report.size_bytes))
    text = f"{', '.join(facts)}."
    if report.red():
        levels = ", ".join(dict.fromkeys(gate.level for gate in report.red()))
        text += f"\n\n**Unverified: these gates are red: {levels}.**"
    return text


def _deviations(report: Report) -> str:
    known = [f"- {_line(kind)}: {count} times" for kind, count in report.counts.items() if count]
    known += [f"- {_line(note)}" for note in report.notes]
    return "\n".join(["## Known deviations", "", *(known or ["None."])])


def _files(report: Report) -> str:
    rows = ((f.name, figures.size(f.size_bytes), f.sha256) for f in report.files)
    return _table("Files", ("file", "size", "sha256"), rows)


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    body = [_row(row) for row in rows]
    if not body:
        return ""
    headings = list(columns)
    return "\n".join([f"## {title}", "", _row(headings), _row("---" for _ in headings), *body])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_cells(cells))} |"


def _cells(cells: Iterable[str]) -> Iterator[str]:
    return (_line(cell).replace("|", "\\|") for cell in cells)


def _line(text: str) -> str:
    """Text that stays on its line and is no HTML: names and details may come from files."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", printable)


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
