"""Stock llama.cpp splits texts with the exported vocabulary as transformers does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from llamacpp_probe import load, tokenize
from tiny_models import export, random_model
from tiny_tokenizers import (
    LLAMA3,
    QWEN2,
    TORTURE,
    UNKNOWN,
    byte_fallback,
    byte_level,
    corpus,
    edit,
    regex_split,
    save,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from exporters.gguf import TokenType, Vocabulary, read_vocabulary
from exporters.gguf.byte_level import byte_level_rules
from pipeline.errors import InputError, UnsupportedError

DEMO = Path(__file__).parents[3] / "pipeline" / "demo" / "model"
SENTENCEPIECE_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": UNKNOWN}
END, PAD = {"eos_token": "<|end|>"}, {"pad_token": "<pad>"}
DIGITS = pre_tokenizers.Digits(individual_digits=True)

TRAINED: dict[str, Callable[[], Tokenizer]] = {
    "llama-bpe": lambda: byte_level(regex_split(LLAMA3)),
    "qwen2": lambda: byte_level(regex_split(QWEN2)),
    "gpt-2": lambda: byte_level(use_regex=True),
    "smollm": lambda: byte_level(DIGITS, use_regex=True),
}


def vocabulary_of(folder: Path, spare: int = 5) -> Vocabulary:
    """The vocabulary for an embedding with some more rows than tokens."""
    tokenizer = reference(folder)
    return read_vocabulary(tokenizer, {"vocab_size": len(tokenizer) + spare})


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def different_texts(folder: Path, texts: tuple[str, ...] = TORTURE) -> list[str]:
    """Texts that llama.cpp splits differently from transformers."""
    pytest.importorskip("llama_cpp")
    vocabulary = vocabulary_of(folder)
    sizes = {"vocab_size": len(vocabulary.tokens), "num_hidden_layers": 1, "hidden_size": 32}
    out = folder / "gguf"
    out.mkdir()
    found = tokenize(export(random_model("llama", **sizes), out, vocabulary), texts)
    expected = [reference(folder)(text)["input_ids"] for text in texts]
    return [text for text, a, b in zip(texts, found, expected, strict=True) if a != b]


def copied(source: Path, folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def test_the_demo_tokenizer(tmp_path: Path) -> None:
    folder = copied(DEMO, tmp_path)
    assert different_texts(folder, (*TORTURE, "a<|end_of_text|> b", " ".join(TORTURE))) == []
    found = vocabulary_of(folder)
    assert (found.model, found.pre) == ("gpt2", "llama-bpe")
    assert (found.bos, found.eos, found.pad, found.unk) == (0, 1, None, None)
    assert (found.add_bos, found.add_eos) == (True, False)
    assert found.token_types[:3] == (TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL)
    assert found.notes == ()


@pytest.mark.parametrize("pre", TRAINED)
def test_byte_level_tokenizers(pre: str, tmp_path: Path) -> None:
    folder = save(TRAINED[pre](), tmp_path, **END)
    assert different_texts(folder) == []
    found = vocabulary_of(folder)
    assert (found.pre, found.add_bos, found.bos, found.eos) == (pre, False, None, 0)


def test_words_that_are_tokens_but_no_merges(tmp_path: Path) -> None:
    """llama-bpe takes them whole, as Llama 3 does (ignore_merges); other tokenizers do not."""
    folder = save(TRAINED["llama-bpe"](), tmp_path, **END)
    whole = "qqzzqq"

    def add_word(spec: dict) -> None:
        spec["model"]["vocab"][whole] = len(spec["model"]["vocab"])

    edit(folder, add_word)
    texts = (whole, f"a {whole}", f"{whole}s")
    assert vocabulary_of(folder).pre == "smaug-bpe"
    assert different_texts(folder, texts) == []

    edit(folder, lambda spec: spec["model"].update(ignore_merges=True))
    (folder / "gguf").rename(tmp_path / "before")
    assert vocabulary_of(folder).pre == "llama-bpe"
    assert different_texts(folder, texts) == []
    assert len(reference(folder)(whole)["input_ids"]) == 1

    edit(
        folder,
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=QWEN2),
    )
    with pytest.raises(UnsupportedError, match="ignore_merges=True"):
        vocabulary_of(folder)


def test_composing_normalizers_are_noted(tmp_path: Path) -> None:
    tokenizer = byte_level(regex_split(QWEN2), normalizer=normalizers.NFC())
    folder = save(tokenizer, tmp_path, **END)
    assert len(vocabulary_of(folder).notes) == 1
    assert different_texts(folder) == [text for text in TORTURE if "cafe\u0301" in text]


def test_byte_fallback_tokenizer(tmp_path: Path) -> None:
    folder = save(byte_fallback(), tmp_path, **SENTENCEPIECE_TOKENS)
    texts = (*TORTURE, "a</s>b </s> c")
    assert different_texts(folder, texts) == []
    found = vocabulary_of(folder)
    assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", True)
    assert (found.unk, found.bos, found.eos) == (0, 1, 2)
    types = found.token_types
    assert types[:3] == (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL)
    assert types[3:259] == (TokenType.BYTE,) * 256
    assert types[-5:] == (TokenType.UNUSED,) * 5
    assert found.tokens[-1] == f"[PAD{len(found.tokens) - 1}]"
    (note,) = found.notes
    assert "no merges" in note


def train_sentencepiece(folder: Path) -> None:
    """A tokenizer.model of the kind of Llama 2, without a tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = folder / "lines.txt"
    lines.write_text("\n".join(line for text in corpus() for line in text.splitlines()))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_model_without_tokenizer_json(legacy: bool, tmp_path: Path) -> None:
    train_sentencepiece(tmp_path)
    options = {**SENTENCEPIECE_TOKENS, "tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = vocabulary_of(tmp_path)
    # transformers 5 and legacy=False give a tokenizer that strips: the one thing that differs.
    stripping = any("start with" in note for note in found.notes)
    spaced = [text for text in TORTURE if text.startswith(" ")]
    assert different_texts(tmp_path) == (spaced if stripping else [])
    assert not any("no merges" in note for note in found.notes)
    assert found.add_bos == (len(reference(tmp_path)("")["input_ids"]) == 1)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace(scheme: str, tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    folder = save(tokenizer, tmp_path, **SENTENCEPIECE_TOKENS)
    found = vocabulary_of(folder)
    assert found.add_space_prefix == (scheme != "never")
    noted = [text for text in ("strips", "special") if scheme == "first" or text == "strips"]
    spaces = [note for note in found.notes if "llama.cpp puts one" in note]
    assert len(spaces) == (0 if scheme == "never" else len(noted))
    texts = ("word", "two words", "a</s>b", " x", "")
    expected = {"always": [" x"], "first": ["a</s>b", " x"], "never": []}[scheme]
    assert different_texts(folder, texts) == expected


def test_added_tokens(tmp_path: Path) -> None:
    tokenizer = TRAINED["qwen2"]()
    tokenizer.add_tokens(["<tool>", "my word"])
    folder = save(tokenizer, tmp_path, **END, **PAD)
    found = vocabulary_of(folder)
    types = dict(zip(found.tokens, found.token_types, strict=True))
    assert types["<tool>"] == types["my word"] == TokenType.USER_DEFINED
    assert types["<pad>"] == TokenType.CONTROL
    assert found.pad == found.tokens.index("<pad>")
    texts = ("a <tool> b<tool>", "in my word, my words", "x<pad>y", "<|end|>")
    assert different_texts(folder, texts) == []
    edit(folder, lambda spec: spec["added_tokens"][-1].update(lstrip=True))
    assert any("added tokens" in note for note in vocabulary_of(folder).notes)


TEMPLATES = {
    "nothing": (None, False, False),
    "begin": ("<|end|> $A", True, False),
    "end": ("$A <|end|>", False, True),
    "both": ("<|end|> $A <|end|>", True, True),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_around_a_text(name: str, tmp_path: Path) -> None:
    template, add_bos, add_eos = TEMPLATES[name]
    tokenizer = TRAINED["gpt-2"]()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<|end|>", 0)]
        )
    folder = save(tokenizer, tmp_path, **END)
    found = vocabulary_of(folder)
    assert (found.add_bos, found.add_eos, found.eos) == (add_bos, add_eos, 0)
    assert different_texts(folder, ("hello", "")) == []


def test_flags_are_written_and_override_the_defaults_of_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    folder = save(TRAINED["llama-bpe"](), tmp_path, **END, chat_template="{{ x }}")
    vocabulary = vocabulary_of(folder)
    sizes = {"vocab_size": len(vocabulary.tokens), "num_hidden_layers": 1}
    metadata = load(export(random_model("llama", **sizes), tmp_path, vocabulary))
    flags = [metadata[f"tokenizer.ggml.add_{end}_token"] for end in ("bos", "eos")]
    assert flags == ["false", "false"]
    assert metadata["tokenizer.chat_template"] == "{{ x }}"


def test_chat_template_files(tmp_path: Path) -> None:
    folder = save(TRAINED["gpt-2"](), tmp_path, **END)
    assert vocabulary_of(folder).chat_template is None
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never run') }}")
    assert vocabulary_of(folder).chat_template == "{{ raise_exception('never run') }}"


def test_several_chat_templates(tmp_path: Path) -> None:
    """The keys are those of the `gguf` package, which reads the file here."""
    sources = {"default": "{{ a }}", "tool_use": "{{ b }}", "r-a-g": "{{ c }}", "r_a_g": "{{ d }}"}
    listed = [{"name": name, "template": source} for name, source in sources.items()]
    folder = save(TRAINED["gpt-2"](), tmp_path, **END, chat_template=listed)
    vocabulary = vocabulary_of(folder)
    (note,) = vocabulary.notes
    assert "'r_a_g' left out" in note
    sizes = {"vocab_size": len(vocabulary.tokens), "num_hidden_layers": 1}
    fields = gguf.GGUFReader(export(random_model("llama", **sizes), tmp_path, vocabulary)).fields
    keys = gguf.Keys.Tokenizer
    assert fields[keys.CHAT_TEMPLATE].contents() == "{{ a }}"
    assert fields[keys.CHAT_TEMPLATE_N.format(name="tool_use")].contents() == "{{ b }}"
    assert fields[keys.CHAT_TEMPLATE_N.format(name="r_a_g")].contents() == "{{ c }}"
    assert fields[keys.CHAT_TEMPLATES].contents() == ["tool_use", "r_a_g"]

    save(TRAINED["gpt-2"](), tmp_path, **END, chat_template=listed[1:2])
    vocabulary = vocabulary_of(folder)
    assert (vocabulary.chat_template, vocabulary.chat_templates) == (None, {"tool_use": "{{ b }}"})
    (note,) = vocabulary.notes
    assert "no default chat template" in note


def test_ids_from_the_config(tmp_path: Path) -> None:
    folder = save(TRAINED["gpt-2"](), tmp_path)
    size = {"vocab_size": 900}
    found = read_vocabulary(reference(folder), size)
    assert (found.bos, found.eos, found.pad) == (None, None, None)
    assert any("end-of-text" in note for note in found.notes)
    ids = {"bos_token_id": 3, "eos_token_id": [5, 6], "pad_token_id": -1}
    found = read_vocabulary(reference(folder), {**size, **ids})
    assert (found.bos, found.eos, found.pad) == (3, 5, None)
    assert found.notes == ()


def test_ids_beyond_the_embedding(tmp_path: Path) -> None:
    tokenizer = reference(save(TRAINED["gpt-2"](), tmp_path))
    ids = {"bos_token_id": 900, "eos_token_id": [128001, 7], "pad_token_id": 899}
    found = read_vocabulary(tokenizer, {"vocab_size": 900, **ids})
    assert (found.bos, found.eos, found.pad) == (None, 7, 899)
    assert [note.partition(" left")[0] for note in found.notes] == [
        "bos token id 900",
        "eos token id 128001",
    ]
    assert not any(entry.value in (900, 128001) for entry in found.metadata())


def test_merges_in_both_spellings() -> None:
    spec = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    for merges in (["a b", "ab c"], [["a", "b"], ["ab", "c"]]):
        model = {"vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, "merges": merges}
        rules = byte_level_rules({**spec, "added_tokens": [], "model": model})
        assert rules.merges == ("a b", "ab c")
        assert rules.pre == "gpt-2"


def unigram() -> Tokenizer:
    return Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))


def word_piece() -> Tokenizer:
    return Tokenizer(models.WordPiece({UNKNOWN: 0, "h": 1}, unk_token=UNKNOWN))


def with_changes(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


UNSUPPORTED: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "unigram": (unigram, "Unigram"),
    "word-piece": (word_piece, "WordPiece"),
    "no-merges": (lambda: Tokenizer(models.BPE({"h": 0, "i": 1}, [])), "without merges"),
    "no-splits": (lambda: with_changes(byte_level(), pre_tokenizer=None), "split rule"),
    "other-splits": (lambda: byte_level(regex_split(r"\w+")), "split rule"),
    "grouped-digits": (lambda: byte_level(pre_tokenizers.Digits(), use_regex=True), "split rule"),
    "lower-case": (
        lambda: byte_level(use_regex=True, normalizer=normalizers.Lowercase()),
        "Lowercase",
    ),
    "dropout": (
        lambda: with_changes(
            byte_level(use_regex=True), model=models.BPE({"h": 0}, [], dropout=0.5)
        ),
        "dropout",
    ),
    "two-begins": (
        lambda: with_changes(
            byte_level(use_regex=True),
            post_processor=processors.TemplateProcessing(
                single="<|end|> <|end|> $A", special_tokens=[("<|end|>", 0)]
            ),
        ),
        "one token in front",
    ),
    "fallback-without-bytes": (
        lambda: Tokenizer(models.BPE({"h": 0, "i": 1}, [], byte_fallback=True)),
        "256 bytes missing",
    ),
    "fallback-split": (
        lambda: with_changes(
            byte_fallback(), normalizer=None, pre_tokenizer=pre_tokenizers.Metaspace()
        ),
        "split rule",
    ),
    "fallback-normalized": (
        lambda: with_changes(byte_fallback(), normalizer=normalizers.NFKC()),
        "normalizer",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_tokenizers_without_an_equivalent(name: str, tmp_path: Path) -> None:
    make, message = UNSUPPORTED[name]
    folder = save(make(), tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        vocabulary_of(folder)


def test_a_space_in_front_of_byte_level_texts(tmp_path: Path) -> None:
    tokenizer = with_changes(byte_level(), pre_tokenizer=pre_tokenizers.ByteLevel())
    folder = save(tokenizer, tmp_path, add_prefix_space=True)
    with pytest.raises(UnsupportedError, match="split rule"):
        vocabulary_of(folder)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    folder = save(TRAINED["gpt-2"](), tmp_path)
    with pytest.raises(InputError, match="899"):
        read_vocabulary(reference(folder), {"vocab_size": 899})


def test_tokens_with_the_same_text(tmp_path: Path) -> None:
    folder = save(TRAINED["gpt-2"](), tmp_path)
    edit(folder, lambda spec: spec["model"]["vocab"].update({"[PAD901]": 900}))
    with pytest.raises(InputError, match="same text"):
        read_vocabulary(reference(folder), {"vocab_size": 902})
