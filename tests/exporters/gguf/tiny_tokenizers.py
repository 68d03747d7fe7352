"""Tokenizers trained in a second, and texts that tell split rules apart."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

GPT4_STYLE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = GPT4_STYLE % "{1,3}"
QWEN2 = GPT4_STYLE % ""
UNKNOWN = "<unk>"

TORTURE = (
    "Hello, world! I'm sure they'll say it's 'fine', WE'VE SAID: IT'S, I'D've, y'all'd.",
    "3 33 333 3333 33333 3.14159 1,234,567.89 0xFF 1e-10 ½ ² ³ Ⅷ ٣٤٥ ४५ 第12章 v2.0.1-rc3",
    "def f(x):\n    if x > 0:\n\t\treturn {'a': [1, 2], \"b\": x**2}  # why\n\n\n    else: pass\n",
    "   leading,  double,   triple,    four     five     \n \n  \n\n   \t \t\t trailing   ",
    "line\r\nbreaks\rof\n\r\nall\u2028kinds\u0085here\x0b\x0c\x1c\x1d",
    "nbsp\u00a0\u00a0x thin\u2009x ideographic\u3000\u3000x bom\ufeffx zero\u200bwidth\u200d\u2060",
    "control\x01\x02\x07\x08\x1b[31m\x7f characters\x9f",
    "我想在apple工作1314151天～ 日本語のテキスト、カタカナ。한국어 문장입니다 คำไทย",
    "🚀 😶\u200d🌫️ 👩🏽\u200d💻✅🦙🦙 🇩🇪🇫🇷 ⚡️!!!???...---===~~~",
    "Ελληνικά Кириллица עברית العربية हिन्दी বাংলা ქართული Ñandú straße İstanbul ŉ ǆ",
    "cafe\u0301 e\u0301e\u0301 a\u030a\u0323 \u0301lone \u1100\u1161\u11a8 नि",
    "camelCase HTTPServer2XMLParser snake_case_name SCREAMING_SNAKE kebab-case-name a1b2c3",
    "`````` \"\"\" ''' ((([[[{{{}}}]]])))<<<>>> $$$ €100 #hashtag @user https://x.org/?q=1&r=%20#z",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U000e0041 \ue000 \ufffd ﬁ ﷺ",
    "",
    " ",
    "\n",
    "a",
)


def corpus() -> Iterator[str]:
    """Code and some of the torture texts, so that there are merges of all scripts."""
    source = Path(argparse.__file__).read_text()
    yield from (source[start : start + 400] for start in range(0, len(source), 400))
    for _ in range(8):
        yield from TORTURE


def byte_level(*splits: Any, use_regex: bool = False, normalizer: Any = None) -> Tokenizer:
    """A byte-level BPE tokenizer with these split rules, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last]) if splits else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def regex_split(pattern: str) -> Any:
    """A split into the matches of a pattern."""
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def byte_fallback() -> Tokenizer:
    """A SentencePiece-style BPE tokenizer as Llama 2 has it, trained on the corpus."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [UNKNOWN, "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, limit_alphabet=120, show_progress=False
    )
    # Split for training only, or merges would cross spaces.
    words = (word for text in corpus() for word in text.replace("\n", " ").split(" "))
    tokenizer.train_from_iterator(words, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(spec))


def save(tokenizer: Tokenizer, folder: Path, **options: Any) -> Path:
    """Writes the files of a tokenizer that transformers loads as a generic fast one."""
    options = {"tokenizer_class": "PreTrainedTokenizerFast", **options}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def edit(folder: Path, change: Any) -> Path:
    """Applies `change` to the content of tokenizer.json."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))
    return folder
