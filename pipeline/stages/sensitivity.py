"""What each matrix costs in each type: the KL divergence of the model's predictions.

For a decoder matrix it is estimated to second order. With W moved by dW, the outputs of the linear
move by ``dW x`` and the divergence of all predictions is, with the gradients g of the negative
log-likelihood of *sampled* labels (whose second moment is the Fisher matrix, the Hessian of KL at
no change; Martens, arXiv 1412.1193, sections 5 and 9),

    KL  =  1/2 E[ (sum_t g_t' dW x_t)^2 ]  ~  1/2 E[ sum_t (g_t' dW x_t)^2 ]

where t runs over the tokens of a text, and the second form takes tokens as independent: it is
measured from every token instead of from every text. No factorization of the Fisher matrix is
assumed. Embedding and head are tables of which each candidate is put through the model.

Everything goes block by block, forward to measure H and solve the candidates, then backward for the
gradients. Candidates, residual streams and gradients lie in the run directory: 7 candidates take
about 9 bytes a weight there. In memory are one block with its candidates, and the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.calibration.streams import Stream, site_moments
from pipeline.progress import Progress
from pipeline.quantization.objective import LayerObjective
from pipeline.recipe import Recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.candidates import (
    Candidate,
    CandidateStore,
    candidates_part,
    probe_options,
    solve_site,
    solve_table,
)
from pipeline.stages.gradients import inputs_and_gradients, sampled_gradient
from pipeline.stages.load import Source
from pipeline.stages.walk import choose_device
from runtimes.metrics import kl_divergence
from runtimes.torch_reference import DecoderBlock, TorchReference

MOMENT_WINDOWS, SCORED_WINDOWS, JUDGED_WINDOWS = 32, 16, 8
"""Most calibration windows that H, the scores, and the verdict on swaps are measured on."""

TABLE_WINDOWS = 4
"""Of the scored windows, those that embedding and head are measured on: without sampling, a few
are enough."""

RESIDUAL, GRADIENT = "residual", "gradient"
TABLE_LOSSES = "sensitivity-tables"

Losses = dict[str, dict[str, float]]
"""KL divergence in nats a token, by Hugging Face name and type."""


@dataclass(frozen=True)
class WindowSplit:
    """Calibration windows for three purposes; disjoint if there are at least three.

    Attributes:
        moments: For H, that candidates are solved under, int64 [samples, length].
        scored: That the losses are measured on.
        judged: That swaps are judged on.
    """

    moments: Tensor
    scored: Tensor
    judged: Tensor

    @classmethod
    def of(cls, windows: Tensor) -> WindowSplit:
        """Share out calibration windows, int64 [samples, length]."""
        count = len(windows)
        if count < 3:
            return cls(windows, windows, windows)
        judged = min(JUDGED_WINDOWS, max(1, count // 8))
        scored = min(SCORED_WINDOWS, max(1, count // 4))
        apart = judged + scored
        return cls(windows[apart:][:MOMENT_WINDOWS], windows[judged:apart], windows[:judged])

    @property
    def disjoint(self) -> bool:
        """Whether no window serves twice."""
        return self.moments is not self.scored


class Sensitivity:
    """Measures the loss of every matrix in every candidate type, and keeps it in the run directory.

    Args:
        source: The checkpoint.
        types: Candidate types by name.
        windows: Calibration windows.
        recipe: Damping, batch, device and seed.
        run: Where finished parts are kept.
        progress: Told about blocks.
    """

    def __init__(
        self,
        source: Source,
        types: Mapping[str, tuple[str, ...]],
        windows: WindowSplit,
        recipe: Recipe,
        run: RunDirectory,
        progress: Progress,
    ) -> None:
        self._source, self._types, self._windows = source, types, windows
        self._recipe, self._run, self._progress = recipe, run, progress
        self._probe = probe_options(recipe)
        self._device = choose_device(recipe.device)
        self._float = TorchReference(
            source.config,
            source.read,
            head=source.head,
            device=self._device,
            inner=source.inner,
        )
        self._store = CandidateStore(run)

    def measure(self) -> Losses:
        """KL divergence by name and type; what an earlier run has measured is not done again.

        Raises:
            InputError: Activations are not finite; names block and site.
        """
        with torch.no_grad():
            final = self._solve()
            losses = self._tables(final)
        return losses | self._linears(final)

    def _solve(self) -> Tensor:
        """Solve the candidates of every block; the scored windows' residual stream at the end."""
        self._progress.phase("candidates")
        n_blocks = self._float.n_blocks
        moments = self._stream(self._windows.moments)
        scored = self._stream(self._windows.scored)
        for index in range(n_blocks):
            part = block_part(index)
            done = self._store.has(part)
            self._progress.block(index + 1, n_blocks, resumed=done)
            block = self._float.block(index)
            if done:
                moments.pass_block(block)
            else:
                residual = torch.cat(scored.residual)
                found = list(self._solve_block(index, block, moments))
                self._store.keep(part, found, **{RESIDUAL: residual})
            scored.pass_block(block)
        return torch.cat(scored.residual)

    def _stream(self, windows: Tensor) -> Stream:
        embedded = self._float.embed(windows.to(self._device))
        return Stream(list(embedded.split(self._recipe.calibration.batch)))

    def _solve_block(self, index: int, block: DecoderBlock, stream: Stream) -> Iterator[Candidate]:
        """Candidates of one block, whose stream is moved past it."""
        architecture = self._source.checkpoint.architecture
        prefix = architecture.block_prefix(index)
        for site in architecture.sites:
            where = f"block {index}, site {site.name}"
            hessian = site_moments(site.name, (block, stream), None, where).solving.hessian
            objective = LayerObjective.from_moments(
                hessian, damping=self._recipe.quantization.damping
            )
            weights = {f"{prefix}{n}.weight": block.linear(n).weight for n in site.linears}
            yield from solve_site(weights, self._types, objective, self._probe)
            stream.pass_site(block, site.name)

    def _tables(self, final: Tensor) -> Losses:
        """Losses of embedding and head, each candidate put through the model."""
        names = [name for name in (EMBEDDING, HEAD) if name in self._types]
        loaded = self._run.load(TABLE_LOSSES)
        if loaded is not None and self._store.has(candidates_part(EMBEDDING)):
            return dict(loaded[1]["losses"])
        self._progress.phase("embedding and head")
        pairs = [(name, kind) for name in names for kind in self._types[name]]
        stored = [solve_table(name, kind, self._source.read(name)) for name, kind in pairs]
        self._store.keep(candidates_part(EMBEDDING), stored)
        losses: Losses = {name: {} for name in names}
        tokens = self._windows.scored[:TABLE_WINDOWS].to(self._device)
        final = final[:TABLE_WINDOWS]
        model = Divergence(self._float, self._head, final)
        for number, (name, kind) in enumerate(pairs):
            self._progress.block(number + 1, len(pairs))
            weight = self._source.read(name).to(self._device)
            table = weight + self._store.change(name, kind, weight)
            head = table if name == self._source.head else None
            moved = final
            if name == EMBEDDING:
                moved = self._through(nn.functional.embedding(tokens, table))
            losses[name][kind] = model.mean(moved, head)
        self._run.store(TABLE_LOSSES, {}, {"losses": losses})
        return losses

    @property
    def _head(self) -> Tensor:
        return self._source.read(self._source.head).to(self._device)

    def _through(self, residual: Tensor) -> Tensor:
        stream = Stream(list(residual.split(self._recipe.calibration.batch)))
        for index in range(self._float.n_blocks):
            stream.pass_block(self._float.block(index))
        return torch.cat(stream.residual)

    def _linears(self, final: Tensor) -> Losses:
        """Losses of the decoder matrices, from the last block to the first."""
        self._progress.phase("sensitivity")
        n_blocks = self._float.n_blocks
        losses: Losses = {}
        gradient: Tensor | None = None
        for index in reversed(range(n_blocks)):
            part = f"sensitivity-{index:04d}"
            loaded = self._run.load(part)
            self._progress.block(n_blocks - index, n_blocks, resumed=loaded is not None)
            if loaded is None:
                if gradient is None:
                    generator = torch.Generator().manual_seed(self._recipe.seed)
                    gradient = sampled_gradient(self._float, self._head, final, generator)
                found, gradient = self._score_block(index, gradient)
                self._run.store(part, {GRADIENT: gradient}, {"losses": found})
            else:
                found, gradient = loaded[1]["losses"], loaded[0][GRADIENT].to(self._device)
            losses |= found
        return losses

    def _score_block(self, index: int, gradient: Tensor) -> tuple[Losses, Tensor]:
        """Losses of one block's matrices, and the gradient at its input."""
        block = self._float.block(index)
        prefix = self._source.checkpoint.architecture.block_prefix(index)
        linears = self._source.checkpoint.architecture.linears
        residual = self._store.beside(block_part(index), RESIDUAL).to(self._device)
        changes = {
            linear: {
                kind: self._store.change(name, kind, block.linear(linear).weight)
                for kind in self._types[name]
            }
            for linear in linears
            if (name := f"{prefix}{linear}.weight")
        }
        sums = {linear: dict.fromkeys(kinds, 0.0) for linear, kinds in changes.items()}
        size = self._recipe.calibration.batch
        before = []
        for part, after in zip(residual.split(size), gradient.split(size), strict=True):
            found, gradients = inputs_and_gradients(block, linears, part, after)
            before.append(found)
            for linear, (x, g) in gradients.items():
                for kind, change in changes[linear].items():
                    scores = ((x @ change.T) * g).sum(-1)
                    sums[linear][kind] += float(scores.double().square().sum())
        tokens = residual.shape[0] * residual.shape[1]
        return {
            f"{prefix}{linear}.weight": {k: total / (2 * tokens) for k, total in kinds.items()}
            for linear, kinds in sums.items()
        }, torch.cat(before)


class Divergence:
    """Mean KL divergence from a reference run, whose logits are computed again each time.

    Args:
        model: Gives the final norm.
        head: The reference's output matrix, [vocabulary, hidden].
        reference: Its residual stream after the last block, [windows, length, hidden].
    """

    def __init__(self, model: TorchReference, head: Tensor, reference: Tensor) -> None:
        self._model, self._head, self._reference = model, head, reference

    def mean(self, candidate: Tensor, head: Tensor | None = None) -> float:
        """Of a candidate's stream [windows, length, hidden], in nats a token.

        Args:
            candidate: Its residual stream after the last block.
            head: Its output matrix, if it is not the reference's.
        """
        other = self._head if head is None else head
        total = 0.0
        for ours, theirs in zip(self._reference, candidate, strict=True):
            before = self._model.head_input(ours) @ self._head.T
            after = self._model.head_input(theirs) @ other.T
            total += float(kl_divergence(before, after).mean())
        return total / len(self._reference)


def block_part(index: int) -> str:
    """Part that holds the candidates of a block and the scored windows at its input."""
    return f"candidates-block-{index:04d}"
