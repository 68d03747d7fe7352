"""Rotations learned against the loss of the whole network.

SpinQuant (arXiv 2405.16406) descends on R1 and R2 by Cayley steps, with the cross-entropy of the
network whose weights (and activations) are quantized. Here the loss is the Kullback-Leibler
divergence from the network in full precision: it is what a deploy is judged by, needs no labels,
and has less noise, since it is 0 for every text where nothing is lost.

Momentum is kept in the Lie algebra: of the gradient G at A only the skew part ``G A' - A G'`` moves
a rotation, and that needs no transport from one A to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.transforms.stiefel import cayley_step

ROUNDS = 10
"""How often the held-out loss is taken while learning."""

HELD_OUT = 8
"""One window of so many is held out."""

POWER_STEPS = 12
"""Steps of the power iteration for a norm that only scales a step."""


class NetworkLoss(Protocol):
    """The loss of a network with rotated and quantized weights."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def windows(self) -> int:
        """How many windows of text there are."""
        ...

    def loss(self, matrices: Sequence[Tensor], which: Sequence[int]) -> float:
        """Mean loss a token on some windows, in nats.

        Args:
            matrices: One stack of rotations for each rotated space, float64 [units, n, n].
            which: Indices of the windows.
        """
        ...

    def gradients(
        self, matrices: Sequence[Tensor], which: Sequence[int]
    ) -> tuple[float, list[Tensor]]:
        """The same, and its gradients in the matrices, float64, of their shapes."""
        ...


@dataclass(frozen=True)
class Descent:
    """How rotations are learned.

    Attributes:
        steps: How many.
        rate: Length of the first step, the largest angle in radians; falls linearly to nothing.
        batch: Windows a step.
        momentum: Share of the last direction that is kept, below 1.
        seed: Of the order of the windows.
    """

    steps: int
    rate: float
    batch: int
    momentum: float
    seed: int


@dataclass(frozen=True)
class Learned:
    """What learning found.

    Attributes:
        matrices: The best rotations by the held-out loss; those of the start among them.
        first: Held-out loss at the start, nats a token.
        least: Of the best.
        step: After so many steps they were found; 0 is the start.
        held_out: Windows that judged.
    """

    matrices: list[Tensor]
    first: float
    least: float
    step: int
    held_out: int


def split_windows(count: int) -> tuple[list[int], list[int]]:
    """Indices of the windows to learn from and of those held out, evenly spread.

    Raises:
        ValueError: There are fewer than two.
    """
    if count < 2:
        raise ValueError(f"{count} calibration window: one to learn from and one to judge by")
    apart = max(1, count // HELD_OUT)
    judges = {(2 * n + 1) * count // (2 * apart) for n in range(apart)}
    return [n for n in range(count) if n not in judges], sorted(judges)


def learn(
    starts: Sequence[Tensor],
    groups: Sequence[int],
    network: NetworkLoss,
    how: Descent,
    tell: Callable[[int, int, float, float], None] = lambda *_: None,
) -> Learned:
    """Descend from rotations on the loss of the network.

    Args:
        starts: One stack of orthogonal matrices for each space, float64 [units, n, n].
        groups: Group of each stack: one step length serves the stacks of a group, so that those
            with small gradients move less.
        network: The loss.
        how: Steps and their length.
        tell: Told before each round: its number from 1, the number of rounds, the held-out loss
            and the mean loss of the round before.

    Returns:
        The best by the loss on held-out windows, never worse there than the start.
    """
    train, judges = split_windows(network.windows)
    drawn = _batches(train, how.batch, torch.Generator().manual_seed(how.seed))
    matrices = list(starts)
    velocity = [torch.zeros_like(one) for one in starts]
    first = least = network.loss(matrices, judges)
    best, found = matrices, 0
    latest, mean, rounds = first, float("nan"), min(ROUNDS, how.steps)
    ends = [(n + 1) * how.steps // rounds for n in range(rounds)]
    for step in range(how.steps):
        if step in (0, *ends):
            tell(ends.index(step) + 2 if step else 1, rounds, latest, mean)
            total, count = 0.0, 0
        loss, gradients = network.gradients(matrices, next(drawn))
        total, count = total + loss, count + 1
        velocity = [
            how.momentum * old + _skew(G, A)
            for old, G, A in zip(velocity, gradients, matrices, strict=True)
        ]
        matrices = _stepped(matrices, velocity, groups, how.rate * (1 - step / how.steps))
        if step + 1 in ends:
            mean, latest = total / count, network.loss(matrices, judges)
            if latest < least:
                best, least, found = matrices, latest, step + 1
    return Learned(best, first, least, found, len(judges))


def _batches(train: list[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Windows of each step: every window once, in random order, before any comes again."""
    waiting: list[int] = []
    while True:
        while len(waiting) < min(size, len(train)):
            waiting += [train[n] for n in torch.randperm(len(train), generator=generator).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]


def _skew(G: Tensor, A: Tensor) -> Tensor:
    product = G @ A.mT
    return product - product.mT


def _stepped(
    matrices: Sequence[Tensor], velocity: Sequence[Tensor], groups: Sequence[int], rate: float
) -> list[Tensor]:
    """Each matrix along its velocity; the fastest plane of a group turns by the rate."""
    sizes = [largest_singular(V) for V in velocity]
    longest = {g: max(s for s, of in zip(sizes, groups, strict=True) if of == g) for g in groups}
    return [
        # cayley_step takes the skew part of its gradient, which of V A / 2 is V.
        cayley_step(A, V @ A / 2, rate / longest[g]) if longest[g] > 0 else A
        for A, V, g in zip(matrices, velocity, groups, strict=True)
    ]


def largest_singular(stack: Tensor) -> float:
    """Largest singular value in a stack of matrices, by power iteration from the longest column;
    a few percent too small where others are close, which is enough for the length of a step."""
    start = stack.square().sum(-2).argmax(-1)
    v = stack.gather(-1, start[:, None, None].expand(-1, stack.shape[-2], 1))
    for _ in range(POWER_STEPS):
        v = stack.mT @ (stack @ v)
        v = v / v.norm(dim=-2, keepdim=True).clamp_min(1e-300)
    return float((stack @ v).norm(dim=-2).max())
