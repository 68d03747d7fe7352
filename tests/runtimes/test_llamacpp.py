"""Stock llama.cpp against transformers and against a direct use of its C API."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparing import compare
from demo_file import MODEL, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError, UnsupportedError, UsageError
from runtimes import llamacpp, llamacpp_decode
from runtimes.base import Runtime
from runtimes.llamacpp import LlamaCpp
from runtimes.metrics import Protocol, windows

pytest.importorskip("llama_cpp")

TORTURE = [
    "",
    " ",
    "Hello world",
    "  two  spaces\t\ttabs\n\n\nlines\r\n",
    "I'll can't WE'RE it's 'quoted' O'Neill",
    "1 12 123 1234 12345678901234567890 3.14159 1e-10",
    "naïve café Ünïcödé ﬁ ½ ① ²",
    "日本語のテキスト 中文字符 한국어 العربية עברית ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 é (combining) \u200b zero width \ufeff bom",
    "def f(x):\n    return {'a': [x ** 2, ~x]}  # comment\n",
    "<|end_of_text|> in the text <|begin_of_text|><|none|>",
    "\x01\x7f\x80 controls \u2028 separators",
]


def reference_logits(model: Any, tokens: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
    for window in tokens:
        with torch.no_grad():
            yield model(window[None]).logits[0, first:-1]


def test_tokenizes_like_hugging_face(demo_gguf: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    runtime = LlamaCpp(demo_gguf)
    assert runtime.tokenize_all(TORTURE) == tokenizer(TORTURE)["input_ids"]
    plain = tokenizer(TORTURE, split_special_tokens=True)["input_ids"]
    assert runtime.tokenize_all(TORTURE, parse_special=False) == plain
    assert runtime.tokenize(TORTURE[-2]) != runtime.tokenize(TORTURE[-2], parse_special=False)
    assert runtime.bos_id() == tokenizer.bos_token_id
    with pytest.raises(InputError, match="UTF-8"):
        runtime.tokenize("\ud800")


@pytest.mark.parametrize(
    ("protocol", "count"),
    [
        (Protocol.llama_perplexity(256), 4),
        (Protocol.gptq_windows(37), 20),
        (Protocol.gptq_windows(1100), 1),  # longer than the context length of the model
    ],
)
def test_f32_file_matches_transformers(
    demo_gguf: Path, demo_ids: list[int], demo_model: Any, protocol: Protocol, count: int
) -> None:
    tokens = windows(demo_ids, protocol, 0, limit=count)
    with LlamaCpp(demo_gguf) as runtime:
        result = compare(
            reference_logits(demo_model, tokens, protocol.first),
            runtime.logits(tokens, protocol.first),
            tokens,
            protocol.first,
        )
    assert result.reference.tokens == count * protocol.scored
    assert abs(result.delta_nll) < 1e-5
    assert result.kld_mean < 1e-8
    assert result.top1_agreement > 0.999
    assert runtime.speed is not None
    assert runtime.speed > 0


def published_perplexity(model: Path, tokens: list[int], context: int) -> float:
    """The loops of llama-perplexity on the C API, one window a batch, all logits."""
    import llama_cpp as api

    params = api.llama_model_default_params()
    params.use_extra_bufts = False
    handle = api.llama_model_load_from_file(str(model).encode(), params)
    options = api.llama_context_default_params()
    options.n_ctx = options.n_batch = context
    options.type_k = options.type_v = options.flash_attn_type = 0
    state = api.llama_init_from_model(handle, options)
    vocabulary = api.llama_model_get_vocab(handle)
    size = api.llama_vocab_n_tokens(vocabulary)
    batch = api.llama_batch_init(context, 0, 1)
    total, count = 0.0, 0
    for start in range(0, len(tokens) // context * context, context):
        api.llama_memory_clear(api.llama_get_memory(state), True)
        chunk = [api.llama_vocab_bos(vocabulary), *tokens[start + 1 : start + context]]
        batch.n_tokens = context
        for i, token in enumerate(chunk):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert api.llama_decode(state, batch) == 0
        for i in range(context // 2, context - 1):
            row = np.ctypeslib.as_array(api.llama_get_logits_ith(state, i), shape=(size,))
            row = row.astype(np.float64)
            total += np.logaddexp.reduce(row) - row[tokens[start + i + 1]]
            count += 1
    api.llama_batch_free(batch)
    api.llama_free(state)
    api.llama_model_free(handle)
    return math.exp(total / count)


@pytest.fixture
def silent() -> Iterator[None]:
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    yield
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))


@pytest.mark.usefixtures("silent")
def test_perplexity_is_that_of_llama_perplexity(demo_gguf: Path, demo_ids: list[int]) -> None:
    protocol = Protocol.llama_perplexity(128)
    ids = demo_ids[: 5 * 128 + 50]
    with LlamaCpp(demo_gguf) as runtime:
        tokens = windows(ids, protocol, runtime.bos_id())
        logits = list(runtime.logits(tokens, protocol.first))
    result = compare(logits, logits, tokens, protocol.first).candidate
    assert result.ppl == pytest.approx(published_perplexity(demo_gguf, ids, 128), rel=1e-6)
    assert result.tokens == 5 * 63


def test_windows_do_not_see_each_other(demo_gguf: Path, demo_ids: list[int]) -> None:
    tokens = windows(demo_ids, Protocol.gptq_windows(64), None, limit=19)  # two batches
    together = list(LlamaCpp(demo_gguf).logits(tokens, 60))
    assert len(together) == 19
    assert all(window.shape == (3, 4096) for window in together)
    for i in (0, 15, 18):
        (alone,) = LlamaCpp(demo_gguf).logits(tokens[i : i + 1], 60)
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-4)


def test_thread_count_does_not_matter(demo_gguf: Path, demo_ids: list[int]) -> None:
    tokens = windows(demo_ids, Protocol.gptq_windows(64), None, limit=2)
    one = torch.stack(list(LlamaCpp(demo_gguf, threads=1).logits(tokens, 0)))
    two = torch.stack(list(LlamaCpp(demo_gguf, threads=2).logits(tokens, 0)))
    assert torch.equal(one, two)


def test_default_mode_rounds_the_cache_only(demo_gguf: Path, demo_ids: list[int]) -> None:
    tokens = windows(demo_ids, Protocol.gptq_windows(128), None, limit=4)
    exact, default = LlamaCpp(demo_gguf), LlamaCpp(demo_gguf, mode="default")
    result = compare(exact.logits(tokens, 0), default.logits(tokens, 0), tokens, 0)
    assert 1e-9 < result.kld_mean < 1e-4
    assert (exact.name, default.name) == ("llama.cpp (exact)", "llama.cpp (default)")


def test_short_trained_context_and_no_tokenizer(
    demo_gguf: Path, demo_ids: list[int], tmp_path: Path
) -> None:
    bare = tmp_path / "bare.gguf"
    write_gguf(bare, tokenizer=False, context_length=32)
    tokens = windows(demo_ids, Protocol.gptq_windows(200), None, limit=1)
    (expected,) = LlamaCpp(demo_gguf).logits(tokens, 100)
    (found,) = LlamaCpp(bare).logits(tokens, 100)
    assert torch.equal(found, expected)
    with pytest.raises(UnsupportedError, match="holds no tokenizer"):
        LlamaCpp(bare).tokenize("text")


def test_no_window_needs_no_child(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp, "WorkerProcess", None)
    runtime = LlamaCpp(demo_gguf)
    assert list(runtime.logits(torch.empty(0, 8, dtype=torch.int64), 0)) == []
    assert runtime.speed is None
    assert isinstance(runtime, Runtime)


@given(
    windows=st.integers(1, 1000),
    context=st.integers(2, 10_000),
    vocabulary=st.integers(2, 300_000),
    data=st.data(),
)
def test_batches_are_bounded(windows: int, context: int, vocabulary: int, data: Any) -> None:
    rows = data.draw(st.integers(1, context - 1))
    sequences, tokens = llamacpp_decode.plan(windows, context, rows, vocabulary)
    assert 1 <= sequences <= windows
    assert 1 <= tokens <= llamacpp_decode.BATCH_TOKENS
    assert tokens == sequences * context or (sequences == 1 and tokens < context)
    one_piece = min(rows, llamacpp_decode.PIECE_TOKENS)
    logits = 4 * min(sequences * rows, tokens) * vocabulary
    assert logits <= max(llamacpp_decode.LOGITS_BYTES, 4 * one_piece * vocabulary)


def test_version_is_that_of_the_package() -> None:
    import llama_cpp

    assert llamacpp.available()
    assert llamacpp.version() == llama_cpp.__version__


def test_senseless_options(demo_gguf: Path) -> None:
    with pytest.raises(UsageError, match="mode 'fast'"):
        LlamaCpp(demo_gguf, mode="fast")  # type: ignore[arg-type]
    for name in ("threads", "time_limit", "memory_limit"):
        with pytest.raises(UsageError, match=f"{name} 0: must be positive"):
            LlamaCpp(demo_gguf, **{name: 0})  # type: ignore[arg-type]
