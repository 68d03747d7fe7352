"""Several GGUF files of one model side by side, in stock llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from exporters.inspect import describe
from pipeline.calibration.text import STDLIB, load_text
from pipeline.errors import InputError, UsageError
from pipeline.progress import Progress
from pipeline.stages.evaluate import evaluate
from runtimes.llamacpp import LlamaCpp
from runtimes.metrics import Comparison, Protocol, windows

SPEED_WINDOWS = 4
"""Windows that each file is timed on, alone and with llama.cpp's default settings."""


@dataclass(frozen=True)
class Compared:
    """One file against the first.

    Attributes:
        path: The file.
        size_bytes: Its size.
        bits_per_weight: Of all its tensors.
        comparison: With the first file, on the same tokens; of the first file with itself.
        tokens_per_second: Evaluation of a prompt under default settings, or None.
    """

    path: Path
    size_bytes: int
    bits_per_weight: float
    comparison: Comparison
    tokens_per_second: float | None


def compare(
    files: Sequence[Path],
    *,
    evaluation: str | None = None,
    context: int = 512,
    chunks: int = 40,
    progress: Progress,
) -> list[Compared]:
    """Perplexity, divergence and speed of GGUF files; the first is the reference of all.

    Args:
        files: Two files or more that share a tokenizer.
        evaluation: Text file or hub data set; by default Python's standard library.
        context: Tokens a chunk, llama-perplexity's protocol.
        chunks: Most chunks.
        progress: A block is a file.

    Raises:
        UsageError: Fewer than two files.
        InputError: A file is missing or damaged, tokenizers differ, or the text is too short.
        UnsupportedError: llama.cpp is not installed, or the first file holds no tokenizer.
    """
    if len(files) < 2:
        raise UsageError("nothing to compare with", fix="give two files or more, the best first")
    described = [describe(path) for path in files]
    text = load_text(evaluation or STDLIB, "evaluation").text
    protocol = Protocol.llama_perplexity(context)
    with ExitStack() as stack:
        runners = [stack.enter_context(LlamaCpp(path)) for path in files]
        tokens = _tokens(runners, files, text, protocol, chunks)
        names = [f"{n} {path.name}" for n, path in enumerate(files)]
        models = {name: runner.logits for name, runner in zip(names, runners, strict=True)}
        pairs = [(names[0], name) for name in names]
        found = evaluate(models, pairs, tokens, protocol, progress)
        return [
            Compared(
                path,
                about.file_bytes,
                about.total.bits_per_weight,
                found[pair],
                _speed(path, tokens, protocol, stack),
            )
            for path, about, pair in zip(files, described, pairs, strict=True)
        ]


def _tokens(
    runners: Sequence[LlamaCpp],
    files: Sequence[Path],
    text: str,
    protocol: Protocol,
    chunks: int,
) -> Tensor:
    ids = runners[0].tokenize(text)
    for runner, path in zip(runners[1:], files[1:], strict=True):
        if runner.tokenize(text[:20_000]) != runners[0].tokenize(text[:20_000]):
            raise InputError(
                f"{path} and {files[0]} tokenize differently",
                why="perplexities over different tokens do not compare",
                fix="compare files of one model",
            )
    return windows(ids, protocol, runners[0].bos_id(), chunks)


def _speed(path: Path, tokens: Tensor, protocol: Protocol, stack: ExitStack) -> float | None:
    runner = stack.enter_context(LlamaCpp(path, mode="default"))
    for _ in runner.logits(tokens[:SPEED_WINDOWS], protocol.first):
        pass
    return runner.speed
