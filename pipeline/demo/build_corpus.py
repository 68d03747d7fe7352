"""Builds what the demo model was trained on: a tokenizer and token files of the standard library.

    python -m pipeline.demo.build_corpus --out DIR

writes ``tokenizer.json`` with its two companions, ``train.u16`` and ``valid.u16`` (little-endian
uint16 token ids; each module is one document: begin-of-text, text, end-of-text).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.demo.stdlib import held_out_sources, shuffled, training_sources

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEFAULT_VOCABULARY = 4096


def train_tokenizer(
    texts: Iterable[str],
    vocabulary: int = DEFAULT_VOCABULARY,
    *,
    pattern: str = LLAMA3_PATTERN,
    special_tokens: Sequence[str] = (BEGIN, END),
    prepend: str | None = BEGIN,
) -> Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
        texts: What to learn merges from.
        vocabulary: Number of tokens, with the special ones and the 256 bytes.
        pattern: Regular expression that cuts text into words, which merges never cross.
        special_tokens: They get the first ids.
        prepend: Special token that encoding puts first, or None.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if prepend is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prepend} $A",
            pair=f"{prepend} $A $B:1",
            special_tokens=[(prepend, tokenizer.token_to_id(prepend))],
        )
    return tokenizer


def save_tokenizer(
    tokenizer: Tokenizer, out: Path, *, begin: str | None = BEGIN, end: str = END
) -> None:
    """Writes the three files that transformers expects of a tokenizer.

    Args:
        tokenizer: As made by `train_tokenizer`.
        out: An existing folder.
        begin: The begin-of-text token, if the model has one.
        end: The end-of-text token.
    """
    special = {"eos_token": end} | ({"bos_token": begin} if begin else {})
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2))


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids of all documents in a row, uint16 [tokens]."""
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    documents = [np.array([begin, *encoding.ids, end], dtype="<u2") for encoding in encodings]
    return np.concatenate(documents)


def build(out: Path, vocabulary: int = DEFAULT_VOCABULARY) -> None:
    """Writes tokenizer and token files to `out`, which is made if need be.

    Raises:
        InputError: This Python comes without its sources.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer((text for _, text in training_sources(tests=False)), vocabulary)
    save_tokenizer(tokenizer, out)
    splits = {
        "train": shuffled(training_sources(tests=True)),
        "valid": held_out_sources(),
    }
    for name, sources in splits.items():
        ids = encode_documents(tokenizer, [text for _, text in sources])
        ids.tofile(out / f"{name}.u16")
        log.info("%s: %d modules, %.2f M tokens", name, len(sources), ids.size / 1e6)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.demo.build_corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--vocabulary", type=int, default=DEFAULT_VOCABULARY, help="tokens")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    build(options.out, options.vocabulary)


if __name__ == "__main__":
    main()
