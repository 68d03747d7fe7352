"""The tokenizer of a GGUF file, rebuilt from its metadata alone as llama.cpp reads it.

Byte-level BPE (``gpt2``) and SentencePiece-like vocabularies (``llama``); source of the rules:
llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from exporters.gguf.reader import quoted
from pipeline.errors import InputError, UnsupportedError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # llama_token_type
_SPACE = "\u2581"

MAX_TOKEN_CHARACTERS = 1024  # merges are searched at every cut of a token

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True)
class PreTokenizer:
    """What ``tokenizer.ggml.pre`` switches on.

    Attributes:
        patterns: Applied one after the other; text between matches is a piece too.
        ignore_merges: Pieces that are tokens are taken whole.
        add_bos: Default of ``tokenizer.ggml.add_bos_token``.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3_PATTERN = _WORDS + r"\p{N}{1,3}" + _AFTER_DIGITS
_LLAMA3 = PreTokenizer((_LLAMA3_PATTERN,), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_WORDS + r"\p{N}" + _AFTER_DIGITS,))
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": PreTokenizer((_LLAMA3_PATTERN,)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
}


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that GGUF metadata describe.

    ``encode(text).ids`` adds BOS and EOS as the file asks and recognises special tokens in the
    text; ``encode(text, add_special_tokens=False)`` leaves BOS and EOS out.

    Args:
        metadata: `GGUFFile.metadata`.

    Raises:
        InputError: The vocabulary contradicts itself.
        UnsupportedError: A kind of tokenizer that is not rebuilt here.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"tokenizer model {quoted(str(model))} in the GGUF file",
            fix="gpt2 (byte-level BPE) and llama (SentencePiece-like) are supported",
        )
    tokens = _tokens(metadata)
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, tokens)
    else:
        tokenizer, add_bos = _sentencepiece(metadata, tokens), True
    _add_special_tokens(tokenizer, metadata, tokens)
    _add_bos_and_eos(tokenizer, metadata, tokens, add_bos)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether its pre-tokenizer implies BOS."""
    name = metadata.get("tokenizer.ggml.pre")
    pre = PRE_TOKENIZERS.get(str(name))
    if pre is None:
        raise UnsupportedError(
            f"pre-tokenizer {quoted(str(name))} in the GGUF file",
            fix=f"known: {', '.join(PRE_TOKENIZERS)}",
        )
    merges = [_pair(text) for text in _texts(metadata, "tokenizer.ggml.merges")]
    tokenizer = _bpe(tokens, merges, ignore_merges=pre.ignore_merges)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(metadata: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    """BPE over characters with byte fallback; merges follow from the scores of the tokens.

    SentencePiece joins the two neighbours whose union has the best score, the leftmost first.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) < len(tokens):
        raise InputError("the GGUF file has fewer tokenizer scores than tokens")
    if not all(isinstance(score, (int, float)) for score in scores):
        raise InputError("tokenizer scores in the GGUF file are not numbers")
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [
        (-scores[index], ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
        for index, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges.sort()
    unknown = _token(metadata, "unknown_token_id", tokens, default=0)
    tokenizer = _bpe(
        tokens, [(left, right) for *_, left, right in merges], byte_fallback=True, unk_token=unknown
    )
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if metadata.get("tokenizer.ggml.add_space_prefix", True) is True:
        steps.insert(0, normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(
            BPE({token: index for index, token in enumerate(tokens)}, merges, **options)
        )
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            "the merges in the GGUF file do not fit its tokens", why=quoted(str(error))
        ) from error


def _add_special_tokens(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str]
) -> None:
    """Tokens found in the text before anything else: control, user-defined and unknown ones."""
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(kinds, list) or (kinds and len(kinds) < len(tokens)):
        raise InputError("the GGUF file has fewer token types than tokens")
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, kinds, strict=False)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )


def _add_bos_and_eos(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: list[str], add_bos: bool
) -> None:
    sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    defaults = {
        "bos": (add_bos, 1 if sentencepiece else 11),
        "eos": (False, 2 if sentencepiece else 11),
    }
    around: dict[str, list[str]] = {"bos": [], "eos": []}
    for end, (default, index) in defaults.items():
        if metadata.get(f"tokenizer.ggml.add_{end}_token", default) is True:
            token = _token(metadata, f"{end}_token_id", tokens, default=index)
            if token is None:
                raise InputError(f"the GGUF file adds {end.upper()} but has no such token")
            around[end].append(token)
    special = {token: tokens.index(token) for token in around["bos"] + around["eos"]}
    if special:
        tokenizer.post_processor = TemplateProcessing(
            single=[*around["bos"], "$A", *around["eos"]], special_tokens=list(special.items())
        )


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """Texts of the tokens by id; empty ones get the name that llama.cpp gives them."""
    texts = _texts(metadata, "tokenizer.ggml.tokens")
    tokens = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
    if len(set(tokens)) != len(tokens):
        raise InputError("the GGUF file holds a token twice", why="llama.cpp aborts on it")
    longest = max(map(len, tokens), default=0)
    if longest > MAX_TOKEN_CHARACTERS:
        raise InputError(f"the GGUF file holds a token of {longest} characters")
    return tokens


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise InputError(f"{key} in the GGUF file is not a list of strings")
    return values


def _pair(merge: str) -> tuple[str, str]:
    """Parts of a merge; the first part may begin with a space but not hold one later."""
    cut = merge.find(" ", 1)
    if cut < 0:
        raise InputError(f"merge {quoted(merge)} in the GGUF file is not a pair")
    return merge[:cut], merge[cut + 1 :]


def _token(metadata: Mapping[str, Any], key: str, tokens: list[str], *, default: int) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{key}", default)
    if isinstance(index, int) and 0 <= index < len(tokens):
        return tokens[index]
    return None
