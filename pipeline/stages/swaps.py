"""Better plans by exchange: judged by the divergence of the whole model on held-out windows.

The knapsack adds up losses as if matrices did not know of each other. Here candidates of all chosen
types are put into the float model together, and an exchange of types is kept if it brings the
model's predictions closer to the float ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.architectures.base import EMBEDDING
from pipeline.progress import Progress
from pipeline.stages.candidates import CandidateStore
from pipeline.stages.export import FileSizes
from pipeline.stages.load import Source
from pipeline.stages.sensitivity import Divergence, Losses
from runtimes.torch_reference import TorchReference

TRIES = 24
"""Exchanges that are judged."""

TRIES_PER_MOVE = 3
"""Partners that one matrix's move is tried with."""

Types = dict[str, str]


@dataclass(frozen=True)
class Swap:
    """Another type for one matrix, or for two.

    Attributes:
        moves: New types by name.
        expected: Change of the divergence by the estimate, nats a token.
    """

    moves: tuple[tuple[str, str], ...]
    expected: float


class PlanJudge:
    """Divergence of the model with candidates of chosen types from the float model.

    Streams of the present plan at the input of every block are kept, so that another plan is
    computed from the first block that differs.

    Args:
        source: The checkpoint.
        store: The candidates.
        tokens: Windows to judge on, int64 [windows, length].
        batch: Windows per forward pass.
        device: Where the model runs.
    """

    def __init__(
        self,
        source: Source,
        store: CandidateStore,
        tokens: Tensor,
        *,
        batch: int,
        device: torch.device,
    ) -> None:
        self._source, self._store, self._batch = source, store, batch
        self._model = TorchReference(
            source.config, source.read, head=source.head, device=device, inner=source.inner
        )
        self._tokens, self._device = tokens.to(device), device
        self._types: Types = {}
        self._states: list[Tensor] = []
        states = self._run({}, 0, self._model.embed(self._tokens))
        head = source.read(source.head).to(device)
        self._divergence = Divergence(self._model, head, states[-1])

    def judge(self, types: Types) -> tuple[float, list[Tensor]]:
        """Divergence of a plan in nats a token, and its streams, for `accept`."""
        differing = {n for n, kind in types.items() if self._types.get(n) != kind}
        if not self._states or EMBEDDING in differing:
            table = self._changed(EMBEDDING, types[EMBEDDING])
            states = self._run(types, 0, nn.functional.embedding(self._tokens, table))
        else:
            blocks = [int(n.split(".")[2]) for n in differing if n.startswith("model.layers.")]
            first = min(blocks, default=self._model.n_blocks)
            states = self._states[:first] + self._run(types, first, self._states[first])
        head = self._changed(self._source.head, types[self._source.head])
        return self._divergence.mean(states[-1], head), states

    def accept(self, types: Types, states: list[Tensor]) -> None:
        """Make a judged plan the present one."""
        self._types, self._states = dict(types), states

    def _run(self, types: Types, first: int, stream: Tensor) -> list[Tensor]:
        """Streams at the input of block `first` and after every block from there."""
        states = [stream]
        for index in range(first, self._model.n_blocks):
            block = self._model.block(index)
            prefix = self._source.checkpoint.architecture.block_prefix(index)
            for linear in self._source.checkpoint.architecture.linears:
                name = f"{prefix}{linear}.weight"
                if name in types:
                    weight = self._changed(name, types[name])
                    block.linear(linear).weight = nn.Parameter(weight, requires_grad=False)
            stream = torch.cat([block(part) for part in stream.split(self._batch)])
            states.append(stream)
        return states

    def _changed(self, name: str, kind: str) -> Tensor:
        weight = self._source.read(name).to(self._device)
        return weight + self._store.change(name, kind, weight)


@dataclass(frozen=True)
class Swapped:
    """Where exchanges led.

    Attributes:
        types: The plan.
        before: Divergence of the plan that exchanges began with, nats a token.
        after: Of `types`; never more than before.
        tried: How many exchanges were judged.
        kept: Those that were kept, each with the divergence that it led to.
    """

    types: Types
    before: float
    after: float
    tried: int
    kept: tuple[tuple[Swap, float], ...]


def improve(
    types: Types,
    losses: Losses,
    sizes: FileSizes,
    budget: int,
    judge: PlanJudge,
    progress: Progress,
) -> Swapped:
    """Exchange types as long as the judge finds the model closer to the float one.

    Args:
        types: Type of every matrix, within the budget.
        losses: Estimated losses by name and candidate type.
        sizes: Bytes of matrices in types.
        budget: Most bytes of the file.
        judge: Tells the divergence of a plan.
        progress: A block is an exchange.
    """
    progress.phase("exchanges")
    before, states = judge.judge(types)
    judge.accept(types, states)
    best, kept = before, []
    seen = {frozenset(types.items())}
    used: dict[tuple[str, str], int] = {}
    for number in range(TRIES):
        swap = next(_open(types, losses, sizes, budget, seen, used), None)
        if swap is None:
            break
        progress.block(number + 1, TRIES)
        changed = types | dict(swap.moves)
        seen.add(frozenset(changed.items()))
        for move in swap.moves:
            used[move] = used.get(move, 0) + 1
        found, states = judge.judge(changed)
        progress.figure("KLD", found)
        if found < best:
            types, best = changed, found
            judge.accept(types, states)
            kept.append((swap, found))
    return Swapped(types, before, best, len(seen) - 1, tuple(kept))


def _open(
    types: Types,
    losses: Losses,
    sizes: FileSizes,
    budget: int,
    seen: Set[frozenset[tuple[str, str]]],
    used: Mapping[tuple[str, str], int],
) -> Iterator[Swap]:
    """Exchanges that are worth a try, the most promising first: to plans that were not judged."""
    for swap in swaps(types, losses, sizes, budget):
        worn = any(used.get(move, 0) >= TRIES_PER_MOVE for move in swap.moves)
        if not worn and frozenset((types | dict(swap.moves)).items()) not in seen:
            yield swap


def swaps(types: Types, losses: Losses, sizes: FileSizes, budget: int) -> list[Swap]:
    """Exchanges within the budget, by rising expected change.

    One matrix goes to its next larger useful type, alone or while another one goes to its next
    smaller one. Useful is a type that no other one beats in size and loss.
    """
    room = budget - sizes.total(types)
    larger: list[tuple[str, str, int, float]] = []
    smaller: list[tuple[str, str, int, float]] = []
    for name, kind in types.items():
        ladder = _ladder(name, losses[name], sizes)
        at = sizes.of(name, kind)
        up = [k for k in ladder if sizes.of(name, k) > at]
        down = [k for k in ladder if sizes.of(name, k) < at]
        for moves, to in ((larger, up[:1]), (smaller, down[-1:])):
            for k in to:
                change = losses[name][k] - losses[name][kind]
                moves.append((name, k, sizes.of(name, k) - at, change))
    found = [Swap(((n, kind),), change) for n, kind, extra, change in larger if extra <= room]
    for name, kind, extra, change in larger:
        for other, kind2, extra2, change2 in smaller:
            if name != other and extra + extra2 <= room:
                found.append(Swap(((name, kind), (other, kind2)), change + change2))
    return sorted(found, key=lambda swap: (swap.expected, swap.moves))


def _ladder(name: str, losses: Mapping[str, float], sizes: FileSizes) -> list[str]:
    """Useful types of a matrix by rising size."""
    kept: list[str] = []
    for kind in sorted(losses, key=lambda k: (sizes.of(name, k), losses[k])):
        if not kept or losses[kind] < losses[kept[-1]]:
            kept.append(kind)
    return kept
