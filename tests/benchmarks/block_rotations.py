"""MixQuant's effect in kind: 4-bit weights and activations, rotations of blocks before down_proj.

Everything that is merged is: R1 and R2 as randomized Hadamard rotations, so that three of the four
sites read rotated inputs. The input of down_proj is rotated at run time, in blocks of b channels,
behind a permutation that is merged (none, MixQuant's mass diffusion, zigzag). Weights are INT4 with
one scale a row (PiSO without data, round to nearest), activations INT4 with one scale a token, both
fake-quantized in PyTorch; embedding and head stay in float. MixQuant: arXiv 2601.22347.

Outliers here are the first sixteenth of the FFN's channels, ten times larger than they were: side
by side, so that a rotation of their block leaves them where they are. A few channels that are a
hundred times larger than all others are beyond any block of 16: they stay 25 times larger.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.progress import open_progress
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import quantize_free
from pipeline.stages.calibrate import prepare_texts
from pipeline.stages.load import Source
from pipeline.stages.transform import transform
from pipeline.stages.walk import choose_device
from pipeline.transforms.operators import Rotation, hadamard_rotation
from tests.benchmarks.transforms import Nowhere, opened, options_of, perplexity
from tests.outliers import inject

ORDERS = ("none", "massdiff", "zigzag")
BLOCKS = (16, 32, 64, 128, 256, 512, 0)
ACTIVATION_LEVELS = 7
WEIGHTS = "INT4"


class FakeQuantized(nn.Module):
    """A linear that rounds its inputs to INT4 with one scale a token."""

    def __init__(self, linear: nn.Linear, rotation: Rotation | None) -> None:
        super().__init__()
        self.linear = linear
        self._rotation = None if rotation is None else moved(rotation, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self._rotation is not None:
            x = self._rotation.forward(x)
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / ACTIVATION_LEVELS
        return self.linear((x / scale).round().clamp(-8, 7) * scale)


def moved(rotation: Rotation, like: Tensor) -> Rotation:
    """The rotation in a weight's precision, where it is."""
    factors = tuple(factor.to(like) for factor in rotation.factors)
    return Rotation(rotation.signs.to(like), rotation.blocks, factors)


def fake_quantized(source: Source, block: int | None, device: str, texts: object) -> float:
    """Perplexity with a rotation of `block` channels before down_proj; 0 is all, None is none."""
    weights: dict[str, Tensor] = {}
    linears = {}
    generator = torch.Generator().manual_seed(1)
    for name in source.plan.types:
        if name in (EMBEDDING, HEAD):
            continue
        weight, rotation = source.exact(name), None
        if name.endswith("down_proj.weight") and block is not None:
            width = weight.shape[1]
            rotation = hadamard_rotation(width, block or width, generator)
            weight = rotation.dual(weight)
        weight = weight.float().to(choose_device(device))
        weights[name] = quantize_free(weight, get_format(WEIGHTS), "piso").dequantize()
        linears[name] = lambda linear, rotation=rotation: FakeQuantized(linear, rotation)
    return perplexity(source, weights, texts, device, linears)  # type: ignore[arg-type]


def measure(
    model: str,
    calibration: str | None,
    evaluation: str | None,
    out: Path,
    *,
    samples: int,
    chunks: int,
    device: str,
    outliers: Sequence[str],
    blocks: Sequence[int] = BLOCKS,
) -> None:
    """Fill the table; figures that `out` already holds are kept, so that a run can be continued."""
    done = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch, open_progress("quiet") as progress:
        folders = {"without": model}
        if "with" in outliers:
            width = json.loads((Path(model) / "config.json").read_text())["intermediate_size"]
            folders["with"] = str(
                inject(
                    Path(model),
                    Path(scratch) / "outliers",
                    factor=10.0,
                    channels=width // 16,
                    kinds=("inner",),
                    together=True,
                )
            )
        cells = [
            (which, order, block)
            for which in outliers
            for order in ORDERS
            for block in ((*blocks, None) if order == "none" else blocks)
            if block != 0 or order == "none"  # in one block, order is nothing
        ]
        for which, order, block in cells:
            key = f"{which} | {order} | {block}"
            if key in done:
                continue
            begun = time.monotonic()
            permute = () if order == "none" else (f"permute:by={order},spaces=inner,block={block}",)
            place = (folders[which], calibration, evaluation)
            rewrites = (*permute, "rotate:allow_untie=true")
            options = options_of(*place, samples, chunks, device, rewrites)
            recipe, source = opened(options, "fast")
            texts = prepare_texts(recipe, source)
            if f"{which} | full precision" not in done:
                done[f"{which} | full precision"] = perplexity(source, {}, texts, device)
            source = transform(recipe, source, texts.calibration, Nowhere(), progress)
            done[key] = fake_quantized(source, block, device, texts)
            seconds = time.monotonic() - begun
            print(f"{key}: ppl {done[key]:.3f}, {seconds:.0f} s", flush=True)
            out.write_text(json.dumps(done, indent=1), encoding="utf-8")
    print(render(done))


def render(done: dict[str, float]) -> str:
    """Markdown: block sizes across, orders down."""
    names = [str(b) if b else "all" for b in BLOCKS]
    lines = []
    for which in ("without", "with"):
        full = done.get(f"{which} | full precision")
        if full is None:
            continue
        alone = done.get(f"{which} | none | None", float("nan"))
        lines += ["", f"{which} outliers: full precision {full:.2f}, no rotation {alone:.2f}", ""]
        lines += [f"| order | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
        for order in ORDERS:
            cells = [done.get(f"{which} | {order} | {b}") for b in BLOCKS]
            shown = ["" if c is None else f"{c:.2f}" for c in cells]
            lines.append(f"| {order} | {' | '.join(shown)} |")
    return "\n".join(lines)
