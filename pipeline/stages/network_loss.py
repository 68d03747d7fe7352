"""What quantization costs the whole network, and the gradients of that cost in its rotations.

Weights are rotated in float32, rounded to the formats that the recipe gives them, and the logits
compared with those of the model in full precision. Rounding has no useful derivative: gradients
pass straight through it (arXiv 1308.3432), so that they are those of a network whose rounding
errors stay what they are while its weights turn.

Memory, on the device: every weight twice in float32 (as it was, and rotated and rounded), one
block's gradients, and of a step the residual stream in front of every block. In main memory the
inputs of the output head of all windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pipeline.architectures.base import EMBEDDING
from pipeline.architectures.spaces import Role, Space
from pipeline.errors import ResourceError
from pipeline.quantization.formats import Format, QuantizedTensor
from pipeline.quantization.layer import quantize_free
from pipeline.quantization.rounding.nearest import nearest_codes
from pipeline.quantization.scales.absmax import absmax
from pipeline.quantization.scales.alternating import alternating
from pipeline.quantization.scales.base import BlockProblem, ScaleRule
from pipeline.quantization.tensor_scale import format_for
from pipeline.stages.gradients import parameters_and_gradients
from pipeline.stages.load import Source
from pipeline.stages.stored import FLOAT_TYPES, StoredTensor
from pipeline.transforms.changes import Change, ReadTensor
from pipeline.transforms.operators import BlockRotation
from runtimes.exact_reference import ExactReference
from runtimes.torch_reference import TorchReference

WIDE_LEVELS = 64
"""Formats of so many levels gain nothing from a search for scales."""

AT_ONCE = 2**22
"""Weights that are rounded together, which bounds memory."""

Round = Callable[[str, Tensor], Tensor]
"""A matrix of that name as its type holds it."""


def quick_rounding(types: Mapping[str, str]) -> Round:
    """Each matrix to nearest in its type, by scales that are nearly the best without data.

    Args:
        types: Type of each matrix by Hugging Face name.
    """

    @torch.no_grad()
    def rounded(name: str, weight: Tensor) -> Tensor:
        if types[name] in FLOAT_TYPES:
            return StoredTensor.floating(types[name], weight).dequantize()
        fmt = format_for(types[name], weight)
        # Blocks of a row do not see each other: as rows of their own they are rounded together.
        blocks = weight.reshape(-1, fmt.block_of(weight.shape[1]))
        if fmt.codebook is not None:
            return quantize_free(blocks, fmt, "piso").dequantize().reshape(weight.shape)
        rule = absmax if len(fmt.levels) > WIDE_LEVELS else alternating
        parts = blocks.split(max(1, AT_ONCE // blocks.shape[1]))
        return torch.cat([_nearest(part, fmt, rule) for part in parts]).reshape(weight.shape)

    return rounded


def _nearest(blocks: Tensor, fmt: Format, rule: ScaleRule) -> Tensor:
    """Every row of [rows, block] on its own at the rule's scales, float32."""
    weights = blocks.double()
    scales = rule(BlockProblem(weights, weights.new_empty(0)), fmt)  # no rule here sees a metric
    codes = (nearest_codes(weights, scales, fmt) + fmt.code_min).to(torch.int8)
    return QuantizedTensor(fmt, codes, scales.fields).dequantize()


class RotatedWeights:
    """The tensors of a network, some of them rotated and rounded anew for each set of rotations.

    Args:
        read: The weights before these rotations.
        names: Of all tensors.
        types: Type of each matrix.
        spaces: What is rotated.
        rounded: Rounds a matrix.
        like: On whose device and in whose precision.

    Attributes:
        base: Every tensor as it was.
        now: As the network has it; of the embedding only, see `embedding`, nothing rotated.
        seen: Indices of the spaces that change a tensor, by its name.
    """

    def __init__(
        self,
        read: ReadTensor,
        names: Iterable[str],
        types: Mapping[str, str],
        spaces: Sequence[Space],
        rounded: Round,
        like: Tensor,
    ) -> None:
        self._types, self._spaces, self._round = types, list(spaces), rounded
        self.base = {name: read(name).to(like) for name in names}
        self.now = dict(self.base)
        self.seen: dict[str, list[int]] = {}
        for index, space in enumerate(self._spaces):
            for name in space.roles:
                if space.roles[name] is not Role.GAINS:
                    self.seen.setdefault(name, []).append(index)
        for name in set(types) - set(self.seen):
            self.now[name] = rounded(name, self.base[name])

    def turn(self, operators: Sequence[Tensor]) -> None:
        """Every rotated tensor anew, but for the embedding."""
        for name in self.seen:
            if name != EMBEDDING:
                rotated = self._rotated(name, self.base[name], operators).detach().contiguous()
                self.now[name] = self._round(name, rotated) if name in self._types else rotated

    def embedding(self, rows: Tensor, operators: Sequence[Tensor]) -> Tensor:
        """Some rows of the embedding, rotated and rounded: rows do not see each other."""
        if EMBEDDING not in self.seen:
            return self.now[EMBEDDING][rows]
        rotated = self._rotated(EMBEDDING, self.base[EMBEDDING][rows], operators)
        return self._round(EMBEDDING, rotated.detach())

    def add(
        self,
        name: str,
        gradient: Tensor,
        operators: Sequence[Tensor],
        sums: Sequence[Tensor],
        rows: Tensor | None = None,
    ) -> None:
        """From the gradient in a tensor as the network has it to those in its rotations.

        Args:
            name: Of the tensor.
            gradient: Of its shape.
            operators: The rotations, with gradients.
            sums: Where their gradients are added.
            rows: Rows of the tensor that the gradient is in; all unless given.
        """
        own = [operators[index] for index in self.seen[name]]
        weight = self.base[name] if rows is None else self.base[name][rows]
        with torch.enable_grad():
            rotated = self._rotated(name, weight, operators)
        found = torch.autograd.grad(rotated, own, gradient)
        for index, one in zip(self.seen[name], found, strict=True):
            sums[index].add_(one)

    def _rotated(self, name: str, weight: Tensor, operators: Sequence[Tensor]) -> Tensor:
        for index in self.seen[name]:
            change = Change(self._spaces[index], BlockRotation(operators[index]))
            weight = change.apply(name, weight)
        return weight


class QuantizedNetwork:
    """A network whose weights are rotated and rounded, beside the one in full precision.

    Args:
        source: Configuration, shapes and the type of each matrix.
        read: The weights before these rotations.
        inner: What the graph does to the inputs of down_proj.
        spaces: What is rotated.
        tokens: int64 [windows, length].
        batch: Windows that run together.
        device: Where.
        rounded: Rounds a matrix; `quick_rounding` of the source's types unless given.
        dtype: Of the network; float64 for tests.

    Raises:
        ResourceError: It does not fit into the device's memory.
    """

    def __init__(
        self,
        source: Source,
        read: ReadTensor,
        inner: Callable[[Tensor], Tensor] | None,
        spaces: Sequence[Space],
        tokens: Tensor,
        *,
        batch: int,
        device: torch.device,
        rounded: Round | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_memory(source, tokens.shape[1], batch, device)
        self.device, self._tokens, self._batch = device, tokens.to(device), batch
        self._like = torch.empty(0, device=device, dtype=dtype)
        types = source.plan.types
        self._weights = RotatedWeights(
            read, source.shapes, types, spaces, rounded or quick_rounding(types), self._like
        )
        self._head = source.head
        kind = ExactReference if dtype is torch.float64 else TorchReference
        full, self._model = (
            kind(source.config, weights.__getitem__, head=self._head, device=device, inner=inner)
            for weights in (self._weights.base, self._weights.now)
        )
        self._wanted = self._head_inputs(full)

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self._tokens)

    @torch.no_grad()
    def loss(self, matrices: Sequence[Tensor], which: Sequence[int]) -> float:
        """Mean divergence a token from the network in full precision, in nats."""
        operators = [one.to(self._like) for one in matrices]
        self._weights.turn(operators)
        total = 0.0
        for part in torch.tensor(which).split(self._batch):
            residual = self._embed(part, operators)[0]
            for index in range(self._model.n_blocks):
                residual = self._model.block(index)(residual)
            head = self._weights.now[self._head]
            total += sum(
                float(self._divergence(int(n), window, head))
                for n, window in zip(part, residual, strict=True)
            )
        return total / (len(which) * self._tokens.shape[1])

    @torch.no_grad()
    def gradients(
        self, matrices: Sequence[Tensor], which: Sequence[int]
    ) -> tuple[float, list[Tensor]]:
        """The same, and its gradients in the rotations, as if rounding added constants."""
        operators = [one.to(self._like).detach().requires_grad_() for one in matrices]
        self._weights.turn(operators)
        sums = [torch.zeros_like(one, device=self.device) for one in matrices]
        total = 0.0
        for part in torch.tensor(which).split(self._batch):
            total += self._back(part, operators, sums)
        count = len(which) * self._tokens.shape[1]
        return total / count, [(one / count).to(m) for one, m in zip(sums, matrices, strict=True)]

    def _back(self, part: Tensor, operators: list[Tensor], sums: list[Tensor]) -> float:
        """Back-propagate through one batch, from the head to the embedding."""
        residual, rows, where = self._embed(part, operators)
        streams = [residual]
        for index in range(self._model.n_blocks):
            streams.append(self._model.block(index)(streams[-1]))
        loss, gradient = self._through_head(part, streams.pop(), operators, sums)
        for index in reversed(range(self._model.n_blocks)):
            gradient = self._through_block(index, streams.pop(), gradient, operators, sums)
        if EMBEDDING in self._weights.seen:
            # A product, not a scatter: the same bits each time on a GPU too.
            chosen = (where.flatten() == torch.arange(len(rows), device=self.device)[:, None]).to(
                gradient
            )
            found = chosen @ gradient.flatten(0, 1)
            self._weights.add(EMBEDDING, found, operators, sums, rows)
        return loss

    def _through_head(
        self, part: Tensor, final: Tensor, operators: list[Tensor], sums: list[Tensor]
    ) -> tuple[float, Tensor]:
        """Sum of the divergences, and its gradient at the end of the last block."""
        seen = self._head in self._weights.seen
        head = self._weights.now[self._head].detach().requires_grad_(seen)
        found = torch.zeros_like(head) if seen else None
        total, gradients = 0.0, []
        for n, window in zip(part, final, strict=True):
            with torch.enable_grad():
                start = window.detach().clone().requires_grad_()
                loss = self._divergence(int(n), start, head)
            first, *rest = torch.autograd.grad(loss, [start, head] if seen else [start])
            if found is not None:
                found += rest[0]
            gradients.append(first)
            total += float(loss)
        if found is not None:
            self._weights.add(self._head, found, operators, sums)
        return total, torch.stack(gradients)

    def _through_block(
        self,
        index: int,
        residual: Tensor,
        gradient: Tensor,
        operators: list[Tensor],
        sums: list[Tensor],
    ) -> Tensor:
        """Gradient at the block's input; its weights' gradients go into the rotations' sums."""
        prefix = f"model.layers.{index}."
        first, weights = parameters_and_gradients(
            self._model.block(index),
            lambda name: prefix + name in self._weights.seen,
            residual,
            gradient,
        )
        for name, found in weights.items():
            self._weights.add(prefix + name, found, operators, sums)
        return first

    def _embed(self, part: Tensor, operators: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Residual stream of a batch, the tokens in it, and where each of them stands."""
        rows, where = self._tokens[part.to(self.device)].unique(return_inverse=True)
        return self._weights.embedding(rows, operators)[where], rows, where

    def _divergence(self, window: int, final: Tensor, head: Tensor) -> Tensor:
        """Sum over a window's tokens of ``KL(full precision || quantized)``."""
        wanted = self._wanted[window].to(self.device) @ self._weights.base[self._head].T
        p = wanted.log_softmax(1)
        q = (self._model.head_input(final) @ head.T).log_softmax(1)
        return (p.exp() * (p - q)).sum()

    @torch.no_grad()
    def _head_inputs(self, model: TorchReference) -> Tensor:
        """Inputs of the head in full precision, in main memory, [windows, length, hidden]."""
        streams = [model.embed(part) for part in self._tokens.split(self._batch)]
        for index in range(model.n_blocks):
            block = model.block(index)
            streams = [block(part) for part in streams]
        return torch.cat([model.head_input(part).cpu() for part in streams])


def check_memory(source: Source, length: int, batch: int, device: torch.device) -> None:
    """Raises ResourceError where a GPU has less memory than learning needs."""
    if device.type != "cuda":
        return
    free, needed = torch.cuda.mem_get_info(device)[0], needed_bytes(source, length, batch)
    if needed > free:
        raise ResourceError(
            f"learning rotations from the whole network takes about {needed / 1e9:.1f} GB of the "
            f"GPU's memory, {free / 1e9:.1f} GB are free",
            why="every weight is there twice in float32, with the gradients of one block",
            fix="rotate:matrix=learned,objective=layers needs a few blocks at a time; or lower "
            "calibration.batch or calibration.seqlen, or use --set device=cpu",
        )


def needed_bytes(source: Source, length: int, batch: int) -> int:
    """About the most memory that learning takes on its device.

    Weights twice, and the largest matrix four times more, with its gradient; rounding's float64
    temporaries; the streams, one block's activations (its widest, ten times) and one window's
    logits, six times.
    """
    sizes = {name: torch.Size(shape).numel() for name, shape in source.shapes.items()}
    rounded = [count for name, count in sizes.items() if name != EMBEDDING]
    size = source.checkpoint.architecture.dimensions(source.checkpoint.config)
    streams = batch * length * size.hidden * (size.layers + 2)
    activations = 10 * batch * length * size.intermediate
    logits = 6 * length * int(source.config.vocab_size)
    weights = sum(sizes.values()) + sum(rounded) + 4 * max(rounded)
    return 4 * (weights + streams + activations + logits) + 120 * AT_ONCE
