"""Windows are real stretches of the text, apart from each other, and counted."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.calibration.batches import other_windows, prepended_bos, sample_windows, tokenize
from pipeline.checkpoint import load_tokenizer, open_checkpoint
from pipeline.demo import MODEL, corpus
from pipeline.errors import InputError, UsageError
from tests.tiny import make_checkpoint


@given(
    tokens=st.integers(1, 400),
    samples=st.integers(1, 50),
    length=st.integers(2, 40),
    seed=st.integers(0, 2**31),
    bos=st.sampled_from([None, 7]),
)
def test_windows_are_disjoint_stretches_in_order(
    tokens: int, samples: int, length: int, seed: int, bos: int | None
) -> None:
    ids = torch.arange(1000, 1000 + tokens)
    text_length = length - (bos is not None)
    if tokens < text_length:
        with pytest.raises(InputError, match="one window needs"):
            sample_windows(ids, samples=samples, length=length, seed=seed, bos_id=bos)
        return
    windows = sample_windows(ids, samples=samples, length=length, seed=seed, bos_id=bos)
    assert windows.tokens.dtype == torch.int64
    assert windows.requested == samples
    assert len(windows.tokens) == samples - windows.dropped == min(samples, tokens // text_length)
    assert windows.tokens.shape[1] == length
    if bos is not None:
        assert (windows.tokens[:, 0] == bos).all()
    text = windows.tokens[:, length - text_length :]
    assert (text.diff(dim=1) == 1).all(), "each window is contiguous text"
    assert (text[1:, 0] > text[:-1, -1]).all(), "windows do not overlap"


def test_windows_are_spread_over_the_whole_text() -> None:
    ids = torch.arange(100_000)
    starts = sample_windows(ids, samples=10, length=10, seed=0).tokens[:, 0]
    assert (starts // 10_000).tolist() == list(range(10))


def test_the_seed_alone_decides() -> None:
    ids = torch.arange(10_000)
    state = torch.get_rng_state()
    one, same, other = (
        sample_windows(ids, samples=20, length=16, seed=seed).tokens for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_short_text_gives_all_it_has_and_says_so() -> None:
    windows = sample_windows(torch.arange(35), samples=128, length=11, seed=0, bos_id=99)
    assert (windows.requested, windows.dropped) == (128, 125)
    assert windows.tokens[:, 1:].flatten().tolist() == list(range(30))


@pytest.mark.parametrize(("samples", "length", "bos"), [(0, 8, None), (1, 0, None), (1, 1, 5)])
def test_senseless_requests_are_refused(samples: int, length: int, bos: int | None) -> None:
    with pytest.raises(UsageError):
        sample_windows(torch.arange(9), samples=samples, length=length, seed=0, bos_id=bos)


def test_a_long_text_is_tokenized_whole_and_without_warnings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = load_tokenizer(open_checkpoint(MODEL))
    text = corpus("evaluation", 20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = tokenize(tokenizer, text)
    expected = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    assert ids.tolist() == expected.encode(text, add_special_tokens=False).ids
    assert len(ids) > tokenizer.model_max_length
    assert not caplog.records


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(InputError, match="no tokens"):
        tokenize(load_tokenizer(open_checkpoint(MODEL)), "")


def test_a_bos_token_is_found_where_the_tokenizer_prepends_one(tmp_path: Path) -> None:
    assert prepended_bos(load_tokenizer(open_checkpoint(MODEL))) == 0
    qwen = make_checkpoint(tmp_path, "qwen2")
    assert prepended_bos(load_tokenizer(open_checkpoint(qwen))) is None


@pytest.mark.parametrize("bos", [None, 7])
def test_other_windows_are_of_the_same_text_and_not_those_drawn(bos: int | None) -> None:
    ids = torch.arange(100, 1105)
    drawn = sample_windows(ids, samples=20, length=10, seed=3, bos_id=bos).tokens
    others = other_windows(ids, drawn, samples=15, seed=3, bos_id=bos)
    again = other_windows(ids, drawn, samples=15, seed=3, bos_id=bos)
    assert others.shape == (15, 10)
    assert torch.equal(others, again)
    first = 0 if bos is None else 1
    starts = others[:, first]
    assert not set(starts.tolist()) & set(drawn[:, first].tolist())
    assert len(set(starts.tolist())) == 15
    assert max(starts[:5]) > 600  # the first ones, which judge, are not the text's beginning
    assert torch.equal(others[:, -1] - starts, torch.full((15,), 9 - first))
    assert bos is None or bool((others[:, 0] == bos).all())


def test_other_windows_are_less_when_the_text_has_no_more() -> None:
    ids = torch.arange(100)
    drawn = sample_windows(ids, samples=8, length=10, seed=0).tokens
    assert len(other_windows(ids, drawn, samples=50, seed=0)) == 2
    everything = sample_windows(ids, samples=10, length=10, seed=0).tokens
    assert other_windows(ids, everything, samples=5, seed=0).shape == (0, 10)
