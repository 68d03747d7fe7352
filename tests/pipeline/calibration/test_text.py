"""Text arrives unchanged from every source, and evaluation never sees calibration text."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.calibration.hub_datasets import PRESETS, DatasetSpec
from pipeline.calibration.text import load_text, load_texts, split_text
from pipeline.demo import corpus
from pipeline.errors import InputError

AWKWARD = "\ufeffone\r\ntwo\rthree\n\n\tπ — 数\u2028end\x00 \n\n\n"


class Hub:
    """Stands in for `datasets.load_dataset`: splits as lists of rows, and a record of calls."""

    def __init__(self, splits: dict[str, dict[str, list[Any]]]) -> None:
        self.splits = splits
        self.calls: list[dict[str, Any]] = []

    def load_dataset(
        self, name: str, config: str | None, *, split: str, **options: Any
    ) -> datasets.Dataset:
        self.calls.append({"name": name, "config": config, "split": split, **options})
        if split not in self.splits:
            raise ValueError(f"Unknown split {split!r}")
        return datasets.Dataset.from_dict(self.splits[split])


def play(monkeypatch: pytest.MonkeyPatch, **splits: dict[str, list[Any]]) -> Hub:
    hub = Hub(splits)
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def test_a_text_file_keeps_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(AWKWARD.encode())
    source = load_text(str(path), "calibration")
    assert source.text.encode() == path.read_bytes()
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (source.name, source.split, source.truncated) == (str(path), "calibration", False)


@pytest.mark.parametrize("limit", [1, 7, 11, len(AWKWARD) - 1, len(AWKWARD), 1000])
def test_a_limit_counts_characters_and_is_reported(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(AWKWARD.encode())
    source = load_text(str(path), "evaluation", limit=limit)
    assert source.text == AWKWARD[:limit]
    assert source.truncated is (limit < len(AWKWARD))


def test_a_limit_may_cut_between_the_bytes_of_a_character(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a" + "€" * 50, encoding="utf-8")  # 3 bytes each: 4 * limit falls inside one
    for limit in range(1, 12):
        assert load_text(str(path), "calibration", limit=limit).text == ("a" + "€" * 50)[:limit]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "no text"),
        (b" \n\t", "no text"),
        (b"abc\xff", "byte 3"),
        ("é".encode("utf-16"), "not UTF-8"),
        (b"abc\xe2\x82", "byte 3"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=named):
        load_text(str(path), "calibration")


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder"):
        load_text(str(tmp_path), "calibration")


@pytest.mark.parametrize(
    ("source", "named"),
    [("wikitex2", "did you mean wikitext2"), ("/no/such.txt", "no such file"), ("a/b.txt", "file")],
)
def test_an_unknown_source_is_named(
    source: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = play(monkeypatch)
    with pytest.raises(InputError, match=named):
        load_text(source, "calibration")
    assert hub.calls == [], "a mistyped path is not looked up on the hub"


def test_stdlib_is_the_demo_corpus() -> None:
    for split in ("calibration", "evaluation"):
        source = load_text("stdlib", split, limit=5000)
        assert source.truncated
        assert corpus(split, 20_000).startswith(source.text)


def test_wikitext_is_read_as_the_papers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = play(monkeypatch, train={"text": ["", " = A = \n", "b \n"]}, test={"text": [" c\n", ""]})
    calibration, evaluation = load_texts("wikitext2")
    assert calibration.text == "\n\n = A = \n\n\nb \n"
    assert evaluation.text == " c\n\n\n"
    name = {"name": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"}
    assert hub.calls == [{**name, "split": "train"}, {**name, "split": "test"}]


def test_c4_reads_one_shard_of_each_split(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = play(monkeypatch, train={"text": ["x y"], "url": ["z"]})
    load_text("c4", "calibration")
    load_text("c4", "evaluation")
    assert [call["data_files"] for call in hub.calls] == [
        "en/c4-train.00000-of-01024.json.gz",
        "en/c4-validation.00000-of-00008.json.gz",
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_never_use_one_text_twice(preset: str) -> None:
    assert PRESETS[preset]["calibration"] != PRESETS[preset]["evaluation"]


def test_reading_stops_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, train={"text": ["abc"] * 1000})
    source = load_text("o/n", "calibration", limit=12)
    assert (source.text, source.truncated) == ("abc\n\nabc\n\nab", True)


@pytest.mark.parametrize(
    ("text", "use", "expected"),
    [
        ("o/n", "calibration", DatasetSpec("o/n")),
        ("o/n", "evaluation", DatasetSpec("o/n", None, ("test", "validation"))),
        ("o/n:cfg", "calibration", DatasetSpec("o/n", "cfg")),
        ("o/n::val", "calibration", DatasetSpec("o/n", None, ("val",))),
        ("o/n:cfg:val:body", "evaluation", DatasetSpec("o/n", "cfg", ("val",), "body")),
    ],
)
def test_data_set_names_are_parsed(text: str, use: str, expected: DatasetSpec) -> None:
    assert DatasetSpec.parse(text, use) == expected


def test_evaluation_falls_to_the_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = play(monkeypatch, train={"text": ["t"]}, validation={"text": ["v"]})
    assert load_text("o/n", "evaluation").text == "v"
    assert [call["split"] for call in hub.calls] == ["test", "validation"]


@pytest.mark.parametrize(
    ("rows", "spec", "expected"),
    [
        ({"text": ["a"], "title": ["b"]}, "o/n", "a"),
        ({"body": ["a"], "stars": [5]}, "o/n", "a"),
        ({"text": ["a"], "title": ["b"]}, "o/n:::title", "b"),
        ({"text": ["a", None, "b"]}, "o/n", "a\n\n\n\nb"),
    ],
)
def test_the_text_column_is_found(
    rows: dict[str, list[Any]], spec: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, train=rows)
    assert load_text(spec, "calibration").text == expected


@pytest.mark.parametrize(
    ("rows", "spec"),
    [
        ({"a": ["x"], "b": ["y"]}, "o/n"),
        ({"stars": [5]}, "o/n"),
        ({"text": [5]}, "o/n"),
        ({"text": ["x"]}, "o/n:::body"),
    ],
)
def test_a_column_is_never_guessed(
    rows: dict[str, list[Any]], spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, train=rows)
    with pytest.raises(InputError, match="no text column"):
        load_text(spec, "calibration")


def test_a_real_data_set_is_read_through_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = datasets.load_dataset
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a\\r\\nb"}\n{"text": "c"}\n')
    (folder / "test.jsonl").write_text('{"text": "d"}\n')

    def local(_: str, config: str | None, *, split: str) -> Any:
        return real(str(folder), config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    calibration, evaluation = load_texts("owner/name")
    assert (calibration.text, evaluation.text) == ("a\r\nb\n\nc", "d")
    with pytest.raises(InputError, match="nosuch"):
        load_text("owner/name::nosuch", "calibration")


@pytest.mark.parametrize(
    "error", [ConnectionError("offline"), FileNotFoundError("none"), OSError()]
)
def test_an_unreachable_hub_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*arguments: Any, **_: Any) -> None:
        calls.append(arguments)
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="Salesforce/wikitext") as caught:
        load_text("wikitext2", "evaluation")
    assert "--calibration FILE" in caught.value.fix
    assert "stdlib" in caught.value.fix
    assert caught.value.why
    assert len(calls) == 1


def test_one_file_for_both_uses_is_cut_in_two(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"paragraph {i}\n\n" for i in range(100)))
    for evaluation in (None, str(path), str(tmp_path / "." / "text.txt")):
        first, second = load_texts(str(path), evaluation)
        assert first.text + second.text == path.read_text()
        assert second.text.startswith("paragraph 9")
        assert first.part
        assert second.part


def test_two_files_are_left_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one\n\ntwo")
    (tmp_path / "b").write_text("three")
    first, second = load_texts(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (first.text, second.text, first.part, second.part) == ("one\n\ntwo", "three", "", "")


@given(
    st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=2, max_size=9
    ),
    st.floats(0.05, 0.95),
)
def test_cutting_loses_nothing_and_cuts_where_paragraphs_end(
    paragraphs: list[str], fraction: float
) -> None:
    text = "\n\n".join(f"x{p}x" for p in paragraphs)
    head, tail = split_text(text, fraction)
    assert head + tail == text
    assert head.strip()
    assert tail.strip()
    assert head.endswith("\n\n")


def test_cutting_takes_the_nearest_paragraph() -> None:
    text = "a" * 80 + "\n\n" + "b" * 5 + "\n\n" + "c" * 11
    assert split_text(text) == ("a" * 80 + "\n\n" + "b" * 5 + "\n\n", "c" * 11)
    assert split_text("a" * 50 + " b " + "c" * 50)[1] == "c" * 50


@pytest.mark.parametrize("text", ["", "word", "word\n\n", "\n\n  \n\n"])
def test_text_that_cannot_be_cut_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="cannot be cut"):
        split_text(text)
