"""Tokenizers load fast and from local files, and nobody's code runs."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pipeline.checkpoint import hf_config, load_tokenizer, open_checkpoint
from pipeline.errors import InputError, UnsupportedError
from tests.pipeline.checkpoint.files import edited
from tests.tiny import FAMILIES, make_checkpoint

TEXT = "def f(x):\n    return x  # größer als 1234 — naïve 数\r\n\tend"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_gives_the_ids_of_its_file(family: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family)
    tokenizer = load_tokenizer(open_checkpoint(tmp_path))
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.is_fast
    assert tokenizer(TEXT).input_ids == expected.encode(TEXT).ids
    assert tokenizer.decode(expected.encode(TEXT, add_special_tokens=False).ids) == TEXT


def canary_code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n"


def plant(folder: Path) -> Path:
    """Adds remote code for config, model and tokenizer that leaves a trace when it runs."""
    canary = folder.parent / "canary"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(canary_code(canary))
    with edited(folder) as config:
        config["auto_map"] = {
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
            "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
        }
    with edited(folder, "tokenizer_config.json") as config:
        config["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    return canary


def test_remote_code_never_runs(folder: Path) -> None:
    canary = plant(folder)
    checkpoint = open_checkpoint(folder)
    hf_config(checkpoint)
    load_tokenizer(checkpoint)
    assert not canary.exists()


def test_a_tokenizer_that_is_only_remote_code_is_refused_or_replaced(folder: Path) -> None:
    canary = plant(folder)
    with edited(folder, "tokenizer_config.json") as config:
        config["tokenizer_class"] = "Evil"
    checkpoint = open_checkpoint(folder)
    with suppress(UnsupportedError):
        assert load_tokenizer(checkpoint).is_fast
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_tokenizer_file_that_is_none_is_named(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_tokenizer(open_checkpoint(folder))


@pytest.mark.parametrize("content", [b"{}", b"{", b"[]", b'{"model": {"type": "Magic"}}'])
def test_a_broken_tokenizer_is_refused(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(UnsupportedError, match="no fast tokenizer") as caught:
        load_tokenizer(open_checkpoint(folder))
    assert caught.value.why


def test_a_checkpoint_without_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UnsupportedError, match="no fast tokenizer"):
        load_tokenizer(open_checkpoint(folder))


def test_ids_beyond_the_embedding_are_refused(folder: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "small", vocab_size=500, num_hidden_layers=1)
    shutil.copy(folder / "tokenizer.json", other)
    with pytest.raises(InputError, match="ids up to 511, the embedding 500 rows"):
        load_tokenizer(open_checkpoint(other))
