"""Trains a small language model on token files, as the demo model was trained.

    python -m pipeline.demo.build_corpus --out corpus
    python -m pipeline.demo.train --data corpus --out model --epochs 10 --batch 16

writes a Hugging Face model folder (bfloat16). The defaults are the demo model's sizes. Minutes on a
data-centre GPU; on a CPU, only toys.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CLASS_PREFIX = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@dataclass(frozen=True)
class Sizes:
    """Shape of the model; see `pipeline.architectures.Dimensions`."""

    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 768
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 1024
    tied: bool = True


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn.

    Attributes:
        batch: Sequences per step.
        length: Tokens per sequence.
        epochs: Stop after this many passes over the tokens ...
        seconds: ... or after this time, whichever comes first.
        learning_rate: Its peak.
        warmup: Steps of linear rise from zero.
        hold: Fraction of the run at the peak; then a linear fall.
        floor: What the fall ends at, as a fraction of the peak.
        seed: Of weights and batches.
        bfloat16: Multiply in bfloat16 (weights and optimizer stay float32).
        compiled: Use ``torch.compile``.
    """

    batch: int = 64
    length: int = 1024
    epochs: float = 12.0
    seconds: float = 300.0
    learning_rate: float = 3e-3
    warmup: int = 200
    hold: float = 0.4
    floor: float = 0.03
    seed: int = 0
    bfloat16: bool = True
    compiled: bool = False

    def rate(self, step: int, progress: float) -> float:
        """Learning rate at a step that begins at `progress` (0 to 1) of the run."""
        fall = 1.0 if progress < self.hold else (1.0 - progress) / (1.0 - self.hold)
        rise = min(1.0, (step + 1) / self.warmup)
        if fall < 1.0:
            fall = self.floor + (1.0 - self.floor) * max(0.0, fall)
        return self.learning_rate * rise * fall


def build_model(family: str, sizes: Sizes, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A transformers model with fresh float32 weights; global random state is left alone.

    Weights are normal with standard deviation 0.02; what writes to the residual stream is scaled
    down by ``sqrt(2 * layers)`` (GPT-2).

    Args:
        family: ``llama``, ``qwen2`` or ``qwen3``.
        sizes: Shape of the model.
        seed: Of the weights.
        **config: Further settings of the transformers config.
    """
    import transformers

    prefix = CLASS_PREFIX[family]
    values = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": sizes.context,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rms_norm_eps": 1e-6,
        "use_cache": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = getattr(transformers, f"{prefix}Config")(**values | config)
        model = getattr(transformers, f"{prefix}ForCausalLM")(settings).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                writes = "o_proj" in name or "down_proj" in name
                std = 0.02 / math.sqrt(2 * sizes.layers) if writes else 0.02
                weight.normal_(0.0, std, generator=generator)
            elif name.endswith("bias"):
                weight.zero_()
    return model


def next_token_loss(model: torch.nn.Module, ids: Tensor, bfloat16: bool) -> Tensor:
    """Mean loss in nats of every next token of sequences [batch, length + 1]."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(input_ids=ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), ids[:, 1:].reshape(-1).long()
    )


def _optimizer(model: torch.nn.Module, plan: Plan) -> torch.optim.AdamW:
    """AdamW; matrices decay, norms and biases do not."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim == 2], "weight_decay": 0.1},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    fused = weights[0].is_cuda
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=fused)


def train(model: PreTrainedModel, tokens: Tensor, plan: Plan) -> int:
    """Trains in place on random stretches of `tokens`, on the device where the model is.

    Args:
        model: As made by `build_model`.
        tokens: Ids of the training text, integer [tokens].
        plan: How long and how fast.

    Returns:
        Number of steps.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    forward: Any = torch.compile(model) if plan.compiled else model
    optimizer = _optimizer(model, plan)
    generator = torch.Generator(device=device).manual_seed(plan.seed)
    window = torch.arange(plan.length + 1, device=device)
    model.train()
    start, step = time.monotonic(), 0
    while True:
        seen = step * plan.batch * plan.length / (plan.epochs * len(tokens))
        progress = max(seen, (time.monotonic() - start) / plan.seconds)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step, progress)
        first = torch.randint(
            len(tokens) - plan.length, (plan.batch, 1), device=device, generator=generator
        )
        loss = next_token_loss(forward, tokens[first + window].long(), plan.bfloat16)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step == 1:
            start = time.monotonic()  # compilation does not count
        if step % 100 == 0:
            log.info("step %d, %.0f %%, loss %.3f", step, 100 * progress, loss.item())
    model.eval()
    return step


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens: Tensor, length: int, windows: int = 256) -> float:
    """Mean loss, nats per token, over evenly spread windows of `tokens` (integer [tokens])."""
    device = next(model.parameters()).device
    available = (len(tokens) - 1) // length
    chosen = torch.linspace(0, available - 1, min(windows, available)).long().tolist()
    total = 0.0
    for index in chosen:
        ids = tokens[index * length : (index + 1) * length + 1]
        total += next_token_loss(model, ids[None].to(device), bfloat16=False).item()
    return total / len(chosen)


def load_tokens(path: Path) -> Tensor:
    """Ids of a file that `pipeline.demo.build_corpus` wrote, int32 [tokens]."""
    return torch.from_numpy(np.fromfile(path, dtype="<u2").astype(np.int32))


def save(model: PreTrainedModel, tokenizer: Path, out: Path) -> None:
    """Writes a complete model folder in bfloat16; tokenizer files come from folder `tokenizer`."""
    model.to(torch.bfloat16).save_pretrained(out)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)


def _parser() -> argparse.ArgumentParser:
    sizes, plan = Sizes(), Plan()
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.demo.train", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder written by pipeline.demo.build_corpus")
    add("--out", type=Path, required=True, help="model folder to write")
    add("--arch", choices=sorted(CLASS_PREFIX), default="llama", help="family")
    for name in ("vocab", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(sizes, name), help="size")
    add("--tied", action=argparse.BooleanOptionalAction, default=True, help="head = embedding")
    add("--length", type=int, default=plan.length, help="tokens per sequence")
    add("--batch", type=int, default=plan.batch, help="sequences per step")
    add("--epochs", type=float, default=plan.epochs, help="passes over the text at most")
    add("--seconds", type=float, default=plan.seconds, help="training time at most")
    add("--learning-rate", type=float, default=plan.learning_rate, help="peak")
    add("--warmup", type=int, default=plan.warmup, help="steps")
    add("--seed", type=int, default=plan.seed, help="of weights and batches")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="autocast")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sizes = Sizes(
        vocab=options.vocab,
        hidden=options.hidden,
        intermediate=options.intermediate,
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        context=options.length,
        tied=options.tied,
    )
    plan = Plan(
        batch=options.batch,
        length=options.length,
        epochs=options.epochs,
        seconds=options.seconds,
        learning_rate=options.learning_rate,
        warmup=options.warmup,
        seed=options.seed,
        bfloat16=options.bfloat16,
        compiled=options.device.startswith("cuda"),
    )
    model = build_model(options.arch, sizes, options.seed).to(options.device)
    steps = train(model, load_tokens(options.data / "train.u16"), plan)
    loss = held_out_loss(model, load_tokens(options.data / "valid.u16"), plan.length)
    log.info("%d steps; held out: %.4f nats per token, ppl %.2f", steps, loss, math.exp(loss))
    save(model, options.data, options.out)


if __name__ == "__main__":
    main()
