"""Tune the gains of the norms of a quantized model, so that it predicts as the float model does.

Every file holds the norms in float32: other gains cost no byte, no time, and no parity. They are
fitted to the KL divergence of the predictions from those of the float model, by Adam on factors of
the gains, on text that the solver has not seen as far as there is any; gradients go through the
whole network. Norm Tweaking (arXiv 2309.02784, section 3) tunes norms after quantization to the
means and variances of each layer's outputs; the loss of the whole network is what EfficientQAT
(arXiv 2407.11062, section 3.3) trains scales with.

What is best on held-out windows is kept: the gains that were, if nothing is better.

In memory are embedding and head, quantized and float, the residual streams of one batch at all
blocks, those of the windows of a round in the float model, and the blocks; where these would take
more than half of what is free, they are read again in every step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.architectures.base import EMBEDDING, FINAL_NORM, is_gain
from pipeline.errors import VerificationError
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.calibrate import HELD_OUT, Texts
from pipeline.stages.gradients import parameters_and_gradients
from pipeline.stages.quantize import QuantizedModel
from pipeline.stages.walk import choose_device
from runtimes.metrics import kl_divergence
from runtimes.torch_reference import DecoderBlock, TorchReference

PART = "norms"
CONTROL_GROUP = Path("/sys/fs/cgroup")
ROUNDS = 5
"""How often gains are judged on held-out windows."""

PATIENCE = 2
"""Rounds in a row that may bring nothing; then no more are made."""

WARM_UP = 10
"""Steps in which the rate rises."""


@dataclass(frozen=True)
class Tuned:
    """How tuning went.

    Attributes:
        steps: Of the optimizer that were asked for; fewer are made if they bring nothing.
        windows: That it may fit to.
        held_out: Windows that it was judged on.
        before: KL divergence from the float model on held-out windows, nats a token.
        after: The same of the gains that were kept.
        kept: Step whose gains were kept; 0 are those of the checkpoint.
    """

    steps: int
    windows: int
    held_out: int
    before: float
    after: float
    kept: int

    def summary(self) -> str:
        """In words."""
        if not self.kept:
            return f"norm gains: none of {self.steps} steps was better on held-out windows"
        return (
            f"norm gains tuned in {self.kept} of {self.steps} steps: KLD on {self.held_out} "
            f"held-out windows {self.before:.4g} -> {self.after:.4g}"
        )


def was_tuned(manifest: Mapping[str, Any]) -> bool:
    """Whether a finished folder has other gains than its checkpoint, by its manifest."""
    return bool(manifest.get("tuning", {}).get("kept", 0))


def tune(
    recipe: Recipe, model: QuantizedModel, texts: Texts, run: RunDirectory, progress: Progress
) -> QuantizedModel:
    """The model with tuned norm gains, if the recipe asks for it.

    Args:
        recipe: Steps, rate, batch and device.
        model: The quantized model.
        texts: Its windows for tuning.
        run: Where tuned gains are kept; an interrupted tuning starts over.
        progress: Told about rounds and the divergence after each.

    Raises:
        ResourceError: The device that the recipe asks for is not there.
    """
    if not recipe.tuning.steps:
        return model
    windows, why = texts.tuning, ""
    if model.source.checkpoint.packed or recipe.imatrix is not None:
        why = "matrices were taken over, or weighted by an importance matrix"
    elif windows is None or len(windows) < 2:
        why = "the calibration text has less than two windows"
    if why or windows is None:
        return _noted(model, f"norm gains are not tuned: {why}", progress)
    fitted_to = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    of = {**recipe.tuning.model_dump(), "windows": fitted_to}
    loaded = run.load(PART)
    if loaded is None or loaded[1]["of"] != of:
        held = min(HELD_OUT, max(1, len(windows) // 4))
        tuner = Tuner(model, recipe, choose_device(recipe.device))
        gains, tuned = tuner.fit(windows[held:], windows[:held], progress)
        run.store(PART, gains, {"of": of, "tuned": asdict(tuned)})
    else:
        gains, tuned = loaded[0], Tuned(**loaded[1]["tuned"])
    source = replace(model.source, tuned=bool(gains))
    return replace(
        model,
        source=source,
        gains=gains,
        tuned=asdict(tuned),
        notes=(*model.notes, tuned.summary()),
    )


def _noted(model: QuantizedModel, note: str, progress: Progress) -> QuantizedModel:
    progress.note(note)
    return replace(model, notes=(*model.notes, note))


class Tuner:
    """The quantized model with gains that have gradients, and the float model's predictions.

    Attributes:
        gains: Present gains by Hugging Face name.
        rate: Largest relative step.

    Args:
        model: The quantized model.
        recipe: Rate, batch and seed.
        device: Where both run.
    """

    def __init__(self, model: QuantizedModel, recipe: Recipe, device: torch.device) -> None:
        source = model.source
        self._recipe, self._device = recipe, device
        self.rate = recipe.tuning.rate

        def engine(read: Any) -> TorchReference:
            return TorchReference(
                source.config, read, head=source.head, device=device, inner=source.inner
            )

        names = [name for name in source.shapes if is_gain(name)]
        self.gains = {name: model.read(name).to(device) for name in names}
        self._student = engine(lambda n: self.gains[n] if n in self.gains else model.read(n))
        self._teacher = engine(source.read)
        self._embedding = model.read(EMBEDDING).to(device)
        tied = source.head == EMBEDDING
        self._head = self._embedding if tied else model.read(source.head).to(device)
        self._float_head = source.read(source.head).to(device)
        sizes = [math.prod(shape) for n, shape in source.shapes.items() if ".layers." in n]
        kept = 4 * sum(sizes) <= free_bytes(device) // 2
        self._blocks: dict[int, DecoderBlock] | None = {} if kept else None

    def fit(
        self, windows: Tensor, held_out: Tensor, progress: Progress
    ) -> tuple[dict[str, Tensor], Tuned]:
        """Descend, and keep what is best on held-out windows.

        Args:
            windows: To fit to, int64 [n, length]; gone through again when they are used up.
            held_out: To judge on, int64 [m, length].
            progress: Told about rounds.

        Returns:
            The gains that were changed, float32 on the CPU; none if none was better.
        """
        steps, batch = self._recipe.tuning.steps, self._recipe.tuning.batch
        generator = torch.Generator().manual_seed(self._recipe.seed)
        order = torch.randperm(len(windows), generator=generator)
        chosen = order[torch.arange(steps * batch) % len(windows)].view(steps, batch)
        descent = _Descent(self, steps)
        judged = self.last_streams(held_out)
        before = after = self.divergence(held_out, judged)
        best, kept, idle, rounds = descent.gains(), 0, 0, min(ROUNDS, steps)
        ends = [(n + 1) * steps // rounds for n in range(rounds)]
        for number, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            progress.block(number + 1, rounds)
            targets = self.last_streams(windows[chosen[first:end].flatten()])
            for step, wanted in zip(range(first, end), targets.split(batch), strict=True):
                descent.step(windows[chosen[step]], wanted)
            figure = math.inf
            with suppress(VerificationError):  # steps that left the range of numbers won nothing
                figure = self.divergence(held_out, judged)
            progress.figure("KLD", figure)
            if figure < after:
                best, kept, after, idle = descent.gains(), end, figure, 0
            else:
                idle += 1
            if idle == PATIENCE:
                break
        self.put(best)
        changed = {n: gain.cpu() for n, gain in best.items()} if kept else {}
        return changed, Tuned(steps, len(windows), len(held_out), before, after, kept)

    def put(self, gains: Mapping[str, Tensor]) -> None:
        """Set gains by Hugging Face name."""
        with torch.no_grad():
            for name, gain in gains.items():
                self.gains[name].copy_(gain)

    @torch.no_grad()
    def last_streams(self, tokens: Tensor) -> Tensor:
        """The float model's residual stream after its last block, on the CPU.

        Returns:
            float32 [n, length, hidden].
        """
        parts = tokens.to(self._device).split(self._recipe.calibration.batch)
        streams = [self._teacher.embed(part) for part in parts]
        for index in range(self._teacher.n_blocks):
            block = self._teacher.block(index)
            streams = [block(stream) for stream in streams]
        return torch.cat([stream.cpu() for stream in streams])

    @torch.no_grad()
    def divergence(self, tokens: Tensor, targets: Tensor) -> float:
        """Mean KL divergence from the float model, nats a token.

        Args:
            tokens: int64 [n, length].
            targets: Their `last_streams`.
        """
        total = 0.0
        for part, wanted in self._batches(tokens, targets):
            *_, last = self._streams(part)
            for ours, theirs in zip(last, wanted, strict=True):
                after = self._student.head_input(ours) @ self._head.T
                total += float(kl_divergence(self._float_logits(theirs), after).mean())
        return total / len(tokens)

    def loss_and_gradients(
        self, tokens: Tensor, targets: Tensor
    ) -> tuple[float, dict[str, Tensor]]:
        """Mean KL divergence from the float model, and its gradient in every gain.

        Args:
            tokens: int64 [n, length].
            targets: Their `last_streams`.
        """
        tokens, targets = tokens.to(self._device), targets.to(self._device)
        streams = list(self._streams(tokens))
        loss, gradient, found = self._through_head(streams.pop(), targets)
        for index in reversed(range(self._student.n_blocks)):
            gradient, gains = parameters_and_gradients(
                self._block(index), is_gain, streams.pop(), gradient
            )
            found |= {f"model.layers.{index}.{name}": one for name, one in gains.items()}
        return loss, found

    def _through_head(
        self, streams: Tensor, targets: Tensor
    ) -> tuple[float, Tensor, dict[str, Tensor]]:
        """Loss, its gradient in the streams after the last block, and in the final norm's gain.

        The gradient of KL(p || q) in the logits of q is q - p: no logits are kept for it.
        """
        positions, total = streams.shape[0] * streams.shape[1], 0.0
        norm, gradients = self._student.final_norm(), []
        in_gain = torch.zeros_like(self.gains[FINAL_NORM])
        for ours, theirs in zip(streams, targets, strict=True):
            with torch.enable_grad():
                stream = ours.detach().requires_grad_()
                norm.weight.requires_grad_()
                normed = norm(stream)
            logits = normed.detach() @ self._head.T
            wanted, found = self._float_logits(theirs).log_softmax(-1), logits.log_softmax(-1)
            likely = wanted.exp()
            total += float((likely * (wanted - found)).sum())
            slope = (found.exp() - likely) @ self._head / positions
            first, gain = torch.autograd.grad(normed, [stream, norm.weight], slope)
            gradients.append(first)
            in_gain += gain
        return total / positions, torch.stack(gradients), {FINAL_NORM: in_gain.detach()}

    @torch.no_grad()
    def _streams(self, tokens: Tensor) -> Iterator[Tensor]:
        """Residual streams at the input of every block, and after the last."""
        stream = torch.nn.functional.embedding(tokens, self._embedding)
        yield stream
        for index in range(self._student.n_blocks):
            stream = self._block(index)(stream)
            yield stream

    def _block(self, index: int) -> DecoderBlock:
        """A block whose norms' gains are those of `gains`, which share their memory."""
        if self._blocks is None:
            return self._student.block(index)
        if index not in self._blocks:
            self._blocks[index] = self._student.block(index)
        return self._blocks[index]

    def _float_logits(self, stream: Tensor) -> Tensor:
        return self._teacher.head_input(stream) @ self._float_head.T

    def _batches(self, tokens: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = self._recipe.tuning.batch
        for part, wanted in zip(tokens.split(size), targets.split(size), strict=True):
            yield part.to(self._device), wanted.to(self._device)


class _Descent:
    """Adam on factors of a tuner's gains."""

    def __init__(self, tuner: Tuner, steps: int) -> None:
        self._tuner, self._steps, self._done = tuner, steps, 0
        self._start = self.gains()
        self._factors = {
            name: torch.zeros_like(gain, requires_grad=True) for name, gain in self._start.items()
        }
        self._optimizer = torch.optim.Adam(self._factors.values(), betas=(0.9, 0.99))

    def gains(self) -> dict[str, Tensor]:
        """The present gains, copied."""
        return {name: gain.clone() for name, gain in self._tuner.gains.items()}

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        """One step on some windows and the float model's last streams for them."""
        _, gradients = self._tuner.loss_and_gradients(tokens, targets)
        for name, factor in self._factors.items():
            factor.grad = gradients[name] * self._start[name]
        rate = self._tuner.rate * schedule(self._done, self._steps)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._done += 1
        self._tuner.put({n: self._start[n] * (1 + f.detach()) for n, f in self._factors.items()})


def schedule(step: int, steps: int) -> float:
    """Share of the rate in a step: rising at first, falling as a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; 0 if the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with suppress(OSError):  # what Linux could free counts too
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(n.split()[1]) for n in lines if n.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # a container's limit; "max" is none
        limit, used = (int((CONTROL_GROUP / f"memory.{n}").read_text()) for n in ("max", "current"))
        found.append(max(0, limit - used))
    return min(found, default=0)
