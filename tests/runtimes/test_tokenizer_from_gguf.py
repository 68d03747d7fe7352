"""Tokenizers rebuilt from GGUF metadata against llama.cpp, transformers and sentencepiece."""

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from demo_file import MODEL

from exporters.gguf.reader import open_gguf
from pipeline.errors import InputError, UnsupportedError
from runtimes import llamacpp
from runtimes.ggml_emulator import GGMLEmulator
from runtimes.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from runtimes.llamacpp import LlamaCpp

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TORTURE = [
    "",
    " ",
    "a",
    "  two  spaces   three    four\t\ttabs \t mixed",
    "line\n\n\nline\r\n\r\nline \n line\n ",
    "don't DON'T we'Ve I'M 'tis 'S 'll'LL x'd ''s",
    "1 12 123 1234 12345678901 3.14159 1,000,000 0x7f ١٢٣ ४५६ Ⅻ ½",
    "naïve café Ünïcode e\u0301 n\u0303 \u00a0nbsp\u2003em\u200bzero\ufeff",
    "日本語の文章です。中文字符，한국어 텍스트",
    "😀😃👨‍👩‍👧‍👦 🇩🇪 👍🏽 \U0001f600\ufe0f",
    "!!! ... ?!?! --- === +=/* */ // # @ $%^&() {}[]<> `~|\\",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass\n",
    "x<|begin_of_text|>y <|end_of_text|><|end_of_text|> z<|begin_of_text",
    "<s> </s> <unk> <0x0A> \u2581 \u2581\u2581a",
    "\x00\x01\x7f\x80 \ud7ff\ue000\uffff \U0010ffff",
    "ЁЖ ñ ß ẞ ﬁ ſ 'ſ K İ ı",
]


@pytest.fixture(scope="module")
def demo_metadata() -> dict[str, Any]:
    """Tokenizer metadata of the demo model."""
    spec = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = spec["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in spec["added_tokens"]}
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if t in special else NORMAL for t in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }


def write(path: Path, metadata: dict[str, Any]) -> Path:
    """A file that holds a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 64}
    sizes |= {"feed_forward_length": 64, "attention.head_count": 1, "rope.dimension_count": 64}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encode(path: Path, texts: list[str]) -> list[list[int]]:
    with open_gguf(path) as file:
        tokenizer = build_tokenizer(file.metadata)
    return [tokenizer.encode(text).ids for text in texts]


def test_demo_file_as_llamacpp_and_transformers(demo_gguf: Path) -> None:
    from transformers import AutoTokenizer

    texts = [*TORTURE, inspect.getsource(argparse)]
    with GGMLEmulator(demo_gguf) as emulator:
        ours = [emulator.tokenize(text) for text in texts]
        with pytest.raises(InputError, match="cannot be encoded"):
            emulator.tokenize("\ud800")
    assert ours == LlamaCpp(demo_gguf).tokenize_all(texts)
    reference = AutoTokenizer.from_pretrained(MODEL, model_max_length=10**9)
    plain = [i for i, text in enumerate(texts) if "'ſ" not in text]  # (?i:'s) folds a long s
    assert [ours[i] for i in plain] == reference([texts[i] for i in plain])["input_ids"]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_as_llamacpp(
    pre: str, demo_metadata: dict[str, Any], tmp_path: Path
) -> None:
    """Without add_bos_token, so that the default of the pre-tokenizer shows."""
    pytest.importorskip("llama_cpp")
    metadata = {**demo_metadata, "tokenizer.ggml.pre": pre}
    del metadata["tokenizer.ggml.add_bos_token"]
    path = write(tmp_path / "v.gguf", metadata)
    texts = [*TORTURE, inspect.getsource(argparse)]
    assert encode(path, texts) == LlamaCpp(path).tokenize_all(texts)


def test_pre_tokenizers_differ(demo_metadata: dict[str, Any], tmp_path: Path) -> None:
    """Or the test above would prove little."""
    results = set()
    for pre in ("llama-bpe", "qwen2", "gpt-2", "smollm"):
        path = write(tmp_path / "v.gguf", {**demo_metadata, "tokenizer.ggml.pre": pre})
        results.add(str(encode(path, TORTURE)))
    assert len(results) == 4


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_bos_eos_and_user_defined_tokens(
    add_bos: bool, add_eos: bool, demo_metadata: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    tokens = [*demo_metadata["tokenizer.ggml.tokens"], "<user tag>", "<user", ""]
    types = [*demo_metadata["tokenizer.ggml.token_type"], USER_DEFINED, USER_DEFINED, UNUSED]
    metadata = {
        **demo_metadata,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.ggml.add_eos_token": add_eos,
    }
    path = write(tmp_path / "v.gguf", metadata)
    texts = ["", "plain", "a<user tag>b<user tagged><user <|end_of_text|>"]
    ours = encode(path, texts)
    assert ours == LlamaCpp(path).tokenize_all(texts)
    assert (ours[1][0] == 0, ours[1][-1] == 1) == (add_bos, add_eos)
    assert len(tokens) - 3 in ours[2]


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    corpus = folder / "corpus.txt"
    corpus.write_text(inspect.getsource(argparse) + "\n".join(TORTURE[3:12]), encoding="utf-8")
    spm.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "m"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=3,
    )
    return spm.SentencePieceProcessor(model_file=str(folder / "m.model"))


def sentencepiece_metadata(model: Any) -> dict[str, Any]:
    def kind(i: int) -> int:
        if model.is_unknown(i):
            return UNKNOWN
        if model.is_control(i):
            return CONTROL
        return BYTE if model.is_byte(i) else NORMAL

    count = model.vocab_size()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [model.get_score(i) for i in range(count)],
        "tokenizer.ggml.token_type": [kind(i) for i in range(count)],
    }


@pytest.mark.parametrize("space_prefix", [None, True, False])
def test_sentencepiece_as_llamacpp(
    space_prefix: bool | None, sentencepiece_model: Any, tmp_path: Path
) -> None:
    metadata = sentencepiece_metadata(sentencepiece_model)
    if space_prefix is not None:
        metadata["tokenizer.ggml.add_space_prefix"] = space_prefix
    path = write(tmp_path / "v.gguf", metadata)
    texts = [*TORTURE, inspect.getsource(argparse)]
    ours = encode(path, texts)
    if llamacpp.available():
        assert ours == LlamaCpp(path).tokenize_all(texts)
    if space_prefix is not False:  # sentencepiece itself knows no special tokens in a text, nor NUL
        plain = [
            i for i, text in enumerate(texts) if text and "<s>" not in text and "\0" not in text
        ]
        reference = [[1, *sentencepiece_model.encode(texts[i])] for i in plain]
        assert [ours[i] for i in plain] == reference


def test_decoding_gives_the_text_back(
    sentencepiece_model: Any, demo_metadata: dict[str, Any]
) -> None:
    text = inspect.getsource(argparse)[:3000]
    for metadata, prefix in (
        (demo_metadata, ""),
        (sentencepiece_metadata(sentencepiece_model), " "),
    ):
        tokenizer = build_tokenizer(metadata)
        assert tokenizer.decode(tokenizer.encode(text).ids) == prefix + text


@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [
        ({"model": "t5"}, UnsupportedError, "tokenizer model 't5'"),
        ({"model": None}, UnsupportedError, "tokenizer model 'None'"),
        ({"pre": "tekken"}, UnsupportedError, "pre-tokenizer 'tekken'"),
        ({"pre": None}, UnsupportedError, "pre-tokenizer 'None'"),
        ({"tokens": None}, InputError, "tokens in the GGUF file is not a list"),
        ({"tokens": [1, 2]}, InputError, "tokens in the GGUF file is not a list"),
        ({"tokens": ["a", "a"]}, InputError, "holds a token twice"),
        ({"tokens": ["a" * 2000]}, InputError, "token of 2000 characters"),
        ({"tokens": ["a"]}, InputError, "merges in the GGUF file do not fit"),
        ({"merges": ["ab"]}, InputError, "merge 'ab' in the GGUF file is not a pair"),
        ({"token_type": [1]}, InputError, "fewer token types"),
        ({"bos_token_id": 1 << 30}, InputError, "adds BOS but has no such token"),
        ({"model": "llama"}, InputError, "fewer tokenizer scores"),
        ({"model": "llama", "scores": ["x"] * 5000}, InputError, "not numbers"),
    ],
)
def test_broken_vocabularies_are_named(
    changes: dict[str, Any], error: type[Exception], pattern: str, demo_metadata: dict[str, Any]
) -> None:
    with pytest.raises(error, match=pattern):
        build_tokenizer(demo_metadata | {f"tokenizer.ggml.{k}": v for k, v in changes.items()})
