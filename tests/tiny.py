"""Tiny checkpoints of every family, made on the spot: random in a blink, trained in seconds."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, normalizers

from pipeline.demo import corpus
from pipeline.demo.build_corpus import BEGIN, END, LLAMA3_PATTERN, save_tokenizer, train_tokenizer
from pipeline.demo.train import Plan, Sizes, build_model, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "qwen2", "qwen3")
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN2_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 512
SIZES = Sizes(
    vocab=VOCABULARY,
    hidden=64,
    intermediate=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    context=256,
    tied=False,
)
TRAINED_SIZES = Sizes(
    vocab=VOCABULARY,
    hidden=128,
    intermediate=256,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    context=256,
    tied=True,
)
TRAINED_PLAN = Plan(
    batch=4,
    length=64,
    epochs=0.2,
    seconds=float("inf"),  # a fixed number of steps: the same model on a busy machine
    learning_rate=5e-3,
    warmup=30,
    bfloat16=False,
)
# The usual initialization (0.02) is for wide models; these learn faster from about 1/sqrt(hidden).
WEIGHT_SCALE = 4.0


@cache
def tiny_tokenizer(family: str) -> Tokenizer:
    """A byte-level BPE tokenizer with the split pattern and special tokens of the family."""
    texts = [corpus("calibration", 200_000)]
    if family == "llama":
        return train_tokenizer(texts, VOCABULARY)
    tokenizer = train_tokenizer(
        texts, VOCABULARY, pattern=QWEN2_PATTERN, special_tokens=QWEN2_TOKENS, prepend=None
    )
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def special_ids(family: str) -> dict[str, int | None]:
    """``bos_token_id`` and ``eos_token_id`` of the tiny tokenizer."""
    if family == "llama":
        return {"bos_token_id": 0, "eos_token_id": 1}
    return {"bos_token_id": None, "eos_token_id": 0}


def random_model(family: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A float32 transformers model in which nothing is trivial: biases not 0, norms not 1.

    Args:
        family: One of `FAMILIES`.
        seed: Of all weights.
        **config: Settings of the transformers config (``hidden_size=256``).
    """
    model = build_model(family, SIZES, seed, **special_ids(family) | config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                noise = 0.2 * torch.randn(weight.shape, generator=generator)
                weight.copy_(noise + (0.0 if name.endswith("bias") else 1.0))
            else:
                weight.mul_(WEIGHT_SCALE)
    return model.eval()


def write_checkpoint(
    model: PreTrainedModel,
    path: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int | None = None,
) -> Path:
    """Writes a complete model folder, as Hugging Face would, and returns it."""
    limit = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    model.to(dtype).save_pretrained(path, **limit)
    begin, end = (BEGIN, END) if family == "llama" else (None, QWEN2_TOKENS[0])
    save_tokenizer(tiny_tokenizer(family), path, begin=begin, end=end)
    return path


def make_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int | None = None,
    **config: Any,
) -> Path:
    """A random checkpoint with tokenizer in folder `path`; see `random_model`."""
    model = random_model(family, seed, **config)
    return write_checkpoint(model, path, family, dtype=dtype, shard_bytes=shard_bytes)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on more threads, by far so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def trained_checkpoint(family: str, sizes: Sizes = TRAINED_SIZES) -> Path:
    """A briefly trained checkpoint, made once a session; copy it before changing anything in it.

    Random models amplify any difference and tell nothing about parity or quality. This one has
    learnt enough of Python's standard library (3.9 nats per held-out token, where token frequencies
    alone give 5.3) to behave like a language model. By default 0.36 M parameters, tied head,
    context 256, bfloat16; about 10 s of one core.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"trained-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    text = corpus("calibration", 1_000_000)
    ids = tiny_tokenizer(family).encode(text, add_special_tokens=False).ids
    model = build_model(family, sizes, 0, **special_ids(family))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(WEIGHT_SCALE if weight.ndim == 2 else 1.0)
    with one_thread():
        train(model, torch.tensor(ids), TRAINED_PLAN)
    return write_checkpoint(model, folder, family)
