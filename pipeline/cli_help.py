"""What ``--help`` says beyond the options: examples to copy, and the exit codes."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.errors import EXIT_CODES

PROGRAM = "python -m pipeline"

MAIN = """\
Hugging Face checkpoints to 2-4 bit files that stock runtimes load, with proof.

A deploy ends with the exported file run in its target runtime and compared with PyTorch.
"""

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("deploy --target gguf", "the embedded demo model, as a first try"),
        ("deploy MODEL --target gguf --type Q4_0 --output DIR", "your model"),
        ("verify DIR", "repeat the proof"),
        ("deploy --help", "all options and more examples"),
    ),
    "deploy": (
        ("deploy --target gguf", "the embedded demo model, as a first try"),
        ("deploy ./my-model --target gguf --type Q4_0 --output out", "a local checkpoint"),
        ("deploy Qwen/Qwen3-0.6B --type Q2_0 --preset best -o out", "a hub model at 2 bits"),
        ("deploy ./my-model --calibration my.txt --samples 64", "your own text"),
        ("deploy ./my-model --type Q4_K_M -o mixed", "one of llama-quantize's mixes"),
        ("deploy ./my-model --target-size 15MB -o fits", "the best types that fit in 15 MB"),
        ("deploy ./my-model --type Q2_K --pure --dry-run", "types and sizes, nothing else"),
        ("deploy ./my-model --target onnx --bits 4 -o out", "for ONNX Runtime"),
        ("deploy ./my-model --target gguf,onnx --bits 2 -o out", "both from one quantization"),
        ("deploy --recipe r.toml --set calibration.seqlen=256", "a recipe, with one change"),
    ),
    "verify": (
        ("verify out", "hashes, then the whole ladder"),
        ("verify out --model /new/place/my-model", "the original has moved"),
    ),
    "export": (
        ("export out --target onnx -o out-onnx", "the codes and scales of out, not solved again"),
        ("export out --target onnx --attention gqa -o out-gqa", "another graph"),
    ),
    "inspect": (
        ("inspect out/model.gguf", "metadata, tensors, bits per weight"),
        ("inspect my-model/model.safetensors", "a checkpoint's shard"),
    ),
    "compare": (
        ("compare f32.gguf ours.gguf theirs.gguf", "all against the first, paired"),
        ("compare a.gguf b.gguf --evaluation my.txt --chunks 20", "on your text"),
    ),
    "ls": (
        ("ls types", "weight types and their size"),
        ("ls presets", "what fast, balanced and best mean"),
        ("ls architectures", "model families"),
        ("ls runtimes", "runtimes, and whether they are installed"),
    ),
    "recipe": (
        ("recipe", "every key, its meaning, value and origin"),
        ("recipe --preset best > r.toml", "a file to edit, for deploy --recipe"),
        ("recipe --recipe r.toml --set seed=1", "what a deploy with these options would do"),
    ),
}
"""Arguments and what they do, by command; "" is the program itself."""


def epilog(command: str) -> str:
    """Examples and exit codes of a command, styled for a terminal.

    Args:
        command: Name of the command, or "" for the program itself.
    """
    lines = [typer.style("Examples", bold=True)]
    for arguments, meaning in EXAMPLES[command]:
        lines += [typer.style(f"  # {meaning}", dim=True), f"  {PROGRAM} {arguments}"]
    lines += ["", typer.style("Exit codes", bold=True)]
    lines += [f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(lines)


class TaughtCommand(TyperCommand):
    """A command whose help ends with examples and exit codes.

    Typer's own epilog is not used: how it breaks lines differs between its versions.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Typer's help, then ours."""
        super().format_help(ctx, formatter)
        typer.echo(epilog(self.name or ""))


class TaughtGroup(TyperGroup):
    """The program itself, whose help ends like that of its commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Typer's help, then ours."""
        super().format_help(ctx, formatter)
        typer.echo(epilog(""))
