"""The tables that a run ends with, and those of ``inspect`` and ``ls``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pipeline import figures
from pipeline.progress import duration
from pipeline.report import Report

if TYPE_CHECKING:
    from exporters.inspect import Description
    from pipeline.stages.compare import Compared

_PROSE = {"claim", "runtime", "limit", "protocol", "value", "name", "what", "what it is", "file"}
"""Columns that may be folded where the terminal is narrow; figures stay whole."""

_STATUS_STYLES = {"green": "green", "red": "bold red", "not run": "dim"}


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Group:
    """A plain table. Cells are texts, never markup: they may come from untrusted files.

    Args:
        title: Above the table.
        columns: Headings.
        rows: Cells; the last cell of a row is coloured if it is a gate's status.
    """
    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        prose = column in _PROSE
        made.add_column(Text(column), overflow="fold" if prose else "ellipsis", no_wrap=not prose)
    for row in rows:
        made.add_row(*(Text(cell, style=_STATUS_STYLES.get(cell, "")) for cell in row))
    return Group(Text(title, style="bold"), made)


def print_report(report: Report, console: Console) -> None:
    """The final tables of `deploy` and `verify`."""
    for made in _report_tables(report):
        console.print(made)
        console.print()
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    console.print(_verdict(report))


def print_plan(plan: Mapping[str, tuple[str, int]], console: Console) -> None:
    """What ``deploy --dry-run`` would store: type and bytes of each tensor."""
    rows = [(name, kind, f"{size:,}") for name, (kind, size) in plan.items()]
    total = sum(size for _, size in plan.values())
    console.print(table("Tensors", ("name", "type", "bytes"), rows))
    console.print(Text(f"{len(plan)} tensors, {total:,} bytes without metadata"))


def print_compared(compared: Sequence[Compared], console: Console) -> None:
    """The table of ``compare``; ratios and divergences are against the first file."""
    rows = []
    for one in compared:
        found = one.comparison
        rows.append(
            (
                one.path.name,
                figures.size(one.size_bytes),
                f"{one.bits_per_weight:.3f}",
                figures.with_error(found.candidate.ppl, found.candidate.stderr),
                figures.signed_with_error(found.delta_nll, found.delta_stderr),
                figures.kl(found.kld_mean),
                figures.kl(found.kld_p999),
                figures.share(found.top1_agreement),
                "-" if one.tokens_per_second is None else f"{one.tokens_per_second:.0f}",
            )
        )
    columns = (
        "file",
        "size",
        "bits",
        "perplexity",
        "ln ratio",
        "KLD",
        "99.9 %",
        "top-1",
        "tokens/s",
    )
    console.print(table(f"Against {compared[0].path.name}", columns, rows))


def _report_tables(report: Report) -> Iterator[Group]:
    if report.qualities:
        quality_rows = map(figures.quality_row, report.qualities)
        yield table("Perplexity", figures.QUALITY_COLUMNS, quality_rows)
    if report.gates:
        yield table("Parity ladder", figures.GATE_COLUMNS, map(figures.gate_row, report.gates))
    counts = [(kind, str(count)) for kind, count in report.counts.items() if count]
    if counts:
        yield table("Done differently from what was asked", ("what", "times"), counts)
    if report.timings:
        timings = ((stage, duration(seconds)) for stage, seconds in report.timings.items())
        yield table("Time", ("stage", "took"), timings)
    if report.files:
        files = ((f.name, figures.size(f.size_bytes), f.sha256[:16]) for f in report.files)
        yield table(f"Output {report.output or ''}", ("file", "size", "sha256"), files)


def _verdict(report: Report) -> Text:
    parts = []
    if report.size_bytes is not None:
        parts.append(figures.size(report.size_bytes))
    if report.bits_per_weight is not None:
        parts.append(f"{report.bits_per_weight:.3f} bits per weight")
    if report.memory_peak_bytes is not None:
        parts.append(f"peak memory {figures.size(report.memory_peak_bytes)}")
    red = report.red()
    skipped = sum(gate.status == "not run" for gate in report.gates)
    if red:
        parts.append(f"RED: {', '.join(dict.fromkeys(gate.level for gate in red))}")
        if report.output is None:
            parts.append("nothing was delivered")
    elif report.gates:
        green = len(report.gates) - skipped
        parts.append(f"{green} gates green" + (f", {skipped} not run" if skipped else ""))
    return Text("; ".join(parts), style="bold red" if red else "bold")


def print_description(description: Description, console: Console) -> None:
    """What `inspect` found in a model file."""
    size = figures.size(description.file_bytes)
    console.print(Text(f"{description.container}, {size}, {len(description.tensors)} tensors"))
    console.print()
    console.print(table("Metadata", ("key", "value"), description.metadata.items()))
    console.print()
    rows = (
        (t.name, t.type_name, " x ".join(map(str, t.shape)), figures.size(t.nbytes))
        for t in description.tensors
    )
    console.print(table("Tensors", ("name", "type", "shape", "size"), rows))
    console.print()
    totals = {**description.by_type, "all": description.total}
    columns = ("type", "tensors", "parameters", "size", "bits per weight")
    sums = (
        (
            name,
            str(total.tensors),
            f"{total.parameters:,}",
            figures.size(total.nbytes),
            f"{total.bits_per_weight:.3f}",
        )
        for name, total in totals.items()
    )
    console.print(table("Types", columns, sums))


def print_listing(title: str, entries: Mapping[str, str], console: Console) -> None:
    """Names and what they mean, for `ls`."""
    console.print(table(title, ("name", "what it is"), entries.items()))
