"""Verdicts, tables and the model card."""

from __future__ import annotations

import io
import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pipeline import figures
from pipeline.card import render_card
from pipeline.json_text import json_text
from pipeline.recipe import Recipe
from pipeline.report import Gate, OutputFile, Quality, Report, Status
from pipeline.tables import print_report

COMMAND = "python -m pipeline deploy 'my model' --target gguf"


def gate(level: str, status: Status, figure: float | str | None = 1.24e-6) -> Gate:
    return Gate(level, "runtime matches PyTorch", "llama.cpp", figure, "< 1e-5", status, "why | so")


QUALITY = Quality("context 512", "llama.cpp", 50.13, 0.521, 50.91, 0.534, 0.01544, 0.00091,
                  0.0123, 0.4321, 0.9312)  # fmt: skip
REPORT = Report(
    gates=(gate("bytes", "green", "identical"), gate("twin", "green"), gate("deployed", "not run")),
    qualities=(QUALITY, Quality("2048 windows", "torch", 1234.5, math.nan, 1300, 12, 0.05, 0.01)),
    files=(OutputFile("model.gguf", 18_300_123, "ab" * 32),),
    bits_per_weight=4.8312,
    size_bytes=18_300_123,
    counts={"damping raised": 2, "types replaced": 0},
    notes=("sample 4 [red] was dropped <script>",),
    timings={"load": 1.25, "quantize": 200.0},
    memory_peak_bytes=1_200_000_000,
    output=Path("out"),
)


def rendered(report: Report, width: int = 80) -> str:
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("levels", "code"),
    [
        ([], 0),
        ([("twin", "green"), ("kernels", "not run")], 0),
        ([("quality", "red"), ("twin", "green")], 3),
        ([("quality", "red"), ("twin", "red")], 14),
        ([("bytes", "red")], 14),
    ],
)
def test_exit_code_is_the_worst_gate(levels: list[tuple[str, Status]], code: int) -> None:
    report = Report(gates=tuple(gate(level, status) for level, status in levels))
    assert report.exit_code == code
    assert report.to_dict()["exit_code"] == code


def test_json_is_strict_and_complete() -> None:
    read = json.loads(REPORT.to_json(), parse_constant=pytest.fail)
    assert read["qualities"][0]["kld_p999"] == 0.4321
    assert read["qualities"][1]["reference_se"] is None
    assert read["gates"][2]["status"] == "not run"
    assert read["files"][0]["sha256"] == "ab" * 32
    assert read["output"] == "out"
    assert read["counts"] == {"damping raised": 2, "types replaced": 0}


def test_json_text_leaves_finite_data_alone() -> None:
    data = {"a": [1, 2.5, True, None, "ü"], "b": {"c": []}}
    assert json.loads(json_text(data)) == data
    assert json.loads(json_text({"x": (math.inf, -math.inf)})) == {"x": [None, None]}


def test_tables_fit_a_narrow_terminal_and_show_every_figure() -> None:
    text = rendered(REPORT)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("50.13±0.52", "50.91±0.53", "+0.0154±0.0009", "0.0123", "93.1%", "1.2e-06",
                 "identical", "not run", "18.3 MB", "4.831 bits per weight", "3 min 20 s",
                 "damping raised", "sample 4 [red]", "abababababababab",
                 "2 gates green, 1 not run"):  # fmt: skip
        assert part in text, part


def test_what_never_happened_is_not_listed() -> None:
    assert "types replaced" not in rendered(REPORT)
    assert "types replaced" not in render_card(REPORT, Recipe(), COMMAND, None)


def test_red_gates_are_named_last() -> None:
    report = replace(REPORT, gates=(gate("deployed", "red"), gate("deployed", "red")))
    assert rendered(report, 200).rstrip().endswith("RED: deployed")
    report = replace(report, output=None)
    assert rendered(report, 200).rstrip().endswith("RED: deployed; nothing was delivered")


def test_empty_report_prints() -> None:
    assert rendered(Report()).strip() == ""


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (18_300_123, "18.3 MB"), (999_900_000, "1.00 GB"),
     (4_210_000_000, "4.21 GB")],
)  # fmt: skip
def test_sizes(nbytes: int, text: str) -> None:
    assert figures.size(nbytes) == text


def front_matter(card: str) -> dict[str, object]:
    assert card.startswith("---\n")
    loaded = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(loaded, dict)
    return loaded


def test_card_front_matter_is_yaml() -> None:
    card = render_card(REPORT, Recipe(), COMMAND, 'org/we: "ird" #name', "apache-2.0")
    front = front_matter(card)
    assert front["base_model"] == 'org/we: "ird" #name'
    assert front["base_model_relation"] == "quantized"
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "gguf"
    assert "Q4_0" in front["tags"]  # type: ignore[operator]
    assert "base_model" not in front_matter(render_card(REPORT, Recipe(), COMMAND, None))


def test_card_says_what_was_done() -> None:
    recipe = Recipe(model="some/model", seed=5)
    card = render_card(REPORT, recipe, COMMAND, "some/model")
    assert f"```sh\n{COMMAND}\n```" in card
    toml = card.split("```toml\n")[1].split("```")[0]
    assert tomllib.loads(toml)["seed"] == 5
    for part in ("# some/model, Q4_0 GGUF", "4.831 bits per weight", "| 50.13±0.52 |",
                 "- damping raised: 2 times", "sample 4 [red] was dropped", "ab" * 32):  # fmt: skip
        assert part in card, part
    assert "Unverified" not in card


def test_card_of_a_failed_run_says_so() -> None:
    report = replace(REPORT, gates=(gate("quality", "red"),), counts={}, notes=())
    card = render_card(report, Recipe(), COMMAND, None)
    assert "**Unverified: these gates are red: quality.**" in card
    assert "## Known deviations\n\nNone." in card


def test_card_keeps_foreign_text_in_its_place() -> None:
    nasty = OutputFile("a|b\n# Heading", 1, "cd" * 32)
    card = render_card(replace(REPORT, files=(nasty,)), Recipe(), "run ```x", None)
    assert "\n# Heading" not in card
    assert "a\\|b" in card
    assert "<script>" not in card
    assert "````sh\nrun ```x\n````" in card


def test_card_tables_are_rectangular() -> None:
    lines = render_card(REPORT, Recipe(), COMMAND, None).splitlines()
    for title, columns in (("## Quality", 8), ("## Parity with PyTorch", 6), ("## Files", 3)):
        start = lines.index(title) + 2
        rows = lines[start : lines.index("", start)] if "" in lines[start:] else lines[start:]
        assert len(rows) >= 3
        assert {row.replace("\\|", "").count("|") for row in rows} == {columns + 1}


def test_a_report_survives_the_manifest() -> None:
    quality = Quality("p", "r", 10.0, 0.1, 11.0, 0.1, 0.09, float("nan"), 0.1, None, 0.9)
    gates = (
        Gate("twin", "c", "r", 1e-7, "x < 1", "green"),
        Gate("tokens", "c", "r", "ok", "", "red"),
    )
    report = Report(gates, (quality,), (OutputFile("a", 1, "00"),), 4.5, 9, {"k": 1}, ("n",))
    again = Report.from_dict(json.loads(report.to_json()))
    assert again.exit_code == report.exit_code == 14
    assert math.isnan(again.qualities[0].d_ln_ppl_se)
    assert again.to_json() == report.to_json()
