"""Walk the decoder blocks: measure, solve, and hand each site's error on to the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.calibration.streams import Stream, site_moments
from pipeline.errors import ResourceError
from pipeline.progress import Progress
from pipeline.quantization.formats import QuantizedTensor, get_format
from pipeline.quantization.layer import LayerOptions, quantize_free, quantize_layer
from pipeline.quantization.objective import LayerObjective
from pipeline.recipe import Recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.load import Source
from pipeline.stages.stored import FLOAT_TYPES, StoredTensor
from runtimes.torch_reference import DecoderBlock, TorchReference

TABLES = "tables"


@dataclass
class QuantizedModel:
    """The finished matrices, read from the run directory one part at a time.

    Attributes:
        sites: One record a site: block, site, relative loss, tokens, dead inputs, damping steps.
    """

    source: Source
    run: RunDirectory
    sites: list[dict[str, Any]]
    _part: tuple[str, dict[str, StoredTensor]] = ("", {})

    def stored(self, name: str) -> StoredTensor:
        """A matrix of the plan, by Hugging Face name."""
        part = part_of(name)
        if self._part[0] != part:
            loaded = self.run.load(part)
            if loaded is None:
                raise ResourceError(
                    f"finished part {part} is no longer sound in {self.run.path}",
                    why="it was read before, so the disk or another program changed it",
                    fix="run the same command again: the part is computed again",
                )
            self._part = (part, restore_part(loaded))
        return self._part[1][name]

    def read(self, name: str) -> Tensor:
        """The weight that the runtime computes with, float32; float tensors as they are."""
        if name in self.source.plan.types:
            return self.stored(name).dequantize()
        return self.source.read(name)

    def counts(self) -> dict[str, int]:
        """How often something was done differently from what was asked."""
        return {
            "types replaced": len(self.source.plan.replaced),
            "sites with raised damping": sum(s["damping_raised"] > 0 for s in self.sites),
            "dead inputs": sum(s["dead_inputs"] for s in self.sites),
            "damaged parts recomputed": self.run.dropped,
        }


def part_of(name: str) -> str:
    """Part of the run directory that holds a matrix."""
    if name in (EMBEDDING, HEAD):
        return TABLES
    return f"block-{int(name.split('.')[2]):04d}"


def restore_part(loaded: tuple[dict[str, Tensor], dict[str, Any]]) -> dict[str, StoredTensor]:
    """The matrices of a stored part by Hugging Face name."""
    tensors, meta = loaded
    return {n: StoredTensor.restore(n, kind, tensors) for n, kind in meta["types"].items()}


@torch.inference_mode()
def quantize(
    recipe: Recipe, source: Source, windows: Tensor, run: RunDirectory, progress: Progress
) -> QuantizedModel:
    """Quantize every matrix of the plan; finished blocks are taken from the run directory.

    Args:
        recipe: Types and methods.
        source: The checkpoint.
        windows: Calibration tokens, int64 [samples, length].
        run: Where finished blocks are kept.
        progress: Told about blocks and the errors of their sites.

    Raises:
        InputError: Activations or moments are not finite; names block and site.
    """
    walk = _Walk(recipe, source, windows, run)
    sites: list[dict[str, Any]] = []
    for index in range(walk.n_blocks):
        loaded = run.load(f"block-{index:04d}")
        progress.block(index + 1, walk.n_blocks, resumed=loaded is not None)
        if loaded is not None:
            walk.replay(index, restore_part(loaded), last=index + 1 == walk.n_blocks)
            sites += loaded[1]["sites"]
            continue
        records = []
        for record in walk.solve(index):
            progress.figure(record["site"], record["loss"])
            records.append(record)
        sites += records
    return QuantizedModel(source, run, sites)


class _Walk:
    """The float and the quantized model at the input of one block, with their streams."""

    def __init__(self, recipe: Recipe, source: Source, windows: Tensor, run: RunDirectory) -> None:
        self._recipe, self._source, self._run = recipe, source, run
        self._tables = self._store_tables()
        read = source.read
        self._float = TorchReference(source.config, read, head=source.head)
        batch = recipe.calibration.batch
        embedded = nn.functional.embedding(windows, self._tables[EMBEDDING].dequantize())
        self._quantized_stream = Stream(list(embedded.split(batch)))
        self._float_stream = (
            Stream(list(self._float.embed(windows).split(batch)))
            if recipe.calibration.mismatch > 0
            else None
        )

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return self._float.n_blocks

    def _store_tables(self) -> dict[str, StoredTensor]:
        """Embedding and head, which need no calibration."""
        loaded = self._run.load(TABLES)
        if loaded is None:
            types = self._source.plan.types
            tables = {
                name: _store_free(types[name], self._source.read(name))
                for name in (EMBEDDING, HEAD)
                if name in types
            }
            self._keep(TABLES, tables, [])
            return tables
        return restore_part(loaded)

    def _keep(
        self, part: str, stored: dict[str, StoredTensor], sites: list[dict[str, Any]]
    ) -> None:
        tensors: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            tensors |= tensor.flatten(name)
        types = {name: tensor.type for name, tensor in stored.items()}
        self._run.store(part, tensors, {"types": types, "sites": sites})

    def replay(self, index: int, stored: dict[str, StoredTensor], *, last: bool) -> None:
        """Move both streams past a block that an earlier run finished."""
        if last:
            return
        if self._float_stream is not None:
            self._float_stream.pass_block(self._float.block(index))
        block = self._float.block(index)
        for name, tensor in stored.items():
            _set(block, _relative(name), tensor.dequantize())
        self._quantized_stream.pass_block(block)

    def solve(self, index: int) -> Iterator[dict[str, Any]]:
        """Quantize one block site by site; yields a record of each site, then stores the block."""
        quantized = self._float.block(index)
        reference = self._float.block(index) if self._float_stream is not None else None
        stored: dict[str, StoredTensor] = {}
        records: list[dict[str, Any]] = []
        prefix = self._source.checkpoint.architecture.block_prefix(index)
        for site in self._source.checkpoint.architecture.sites:
            solved, record = self._solve_site(index, site.name, site.linears, quantized, reference)
            for linear, tensor in solved.items():
                stored[f"{prefix}{linear}.weight"] = tensor
                _set(quantized, linear, tensor.dequantize())
            self._quantized_stream.pass_site(quantized, site.name)
            if reference is not None and self._float_stream is not None:
                self._float_stream.pass_site(reference, site.name)
            records.append(record)
            yield record
        self._keep(f"block-{index:04d}", stored, records)

    def _solve_site(
        self,
        index: int,
        site: str,
        linears: tuple[str, ...],
        quantized: DecoderBlock,
        reference: DecoderBlock | None,
    ) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
        other = (
            (reference, self._float_stream)
            if reference is not None and self._float_stream is not None
            else None
        )
        moments = site_moments(
            site, (quantized, self._quantized_stream), other, f"block {index}, site {site}"
        )
        objective = LayerObjective.from_moments(
            moments.hessian, moments.cross, damping=self._recipe.quantization.damping
        )
        prefix = self._source.checkpoint.architecture.block_prefix(index)
        weights = {linear: quantized.linear(linear).weight for linear in linears}
        kinds = {linear: self._source.plan.types[f"{prefix}{linear}.weight"] for linear in linears}
        solved: dict[str, StoredTensor] = {}
        loss = 0.0
        for kind in dict.fromkeys(kinds.values()):
            group = [linear for linear in linears if kinds[linear] == kind]
            if kind in FLOAT_TYPES:
                solved |= {n: StoredTensor.floating(kind, weights[n]) for n in group}
                continue
            result = quantize_layer(
                torch.cat([weights[n] for n in group]),
                objective,
                get_format(kind),
                layer_options(self._recipe),
            )
            loss += result.relative_loss
            parts = _split(result.quantized, [len(weights[n]) for n in group])
            solved |= {n: StoredTensor(kind, p) for n, p in zip(group, parts, strict=True)}
        return solved, {
            "block": index,
            "site": site,
            "loss": loss,
            "tokens": moments.tokens,
            "dead_inputs": objective.dead_inputs,
            "damping_raised": objective.damping_raised,
        }


def layer_options(recipe: Recipe) -> LayerOptions:
    """The part of a recipe that `quantize_layer` takes."""
    quantization = recipe.quantization
    return LayerOptions(
        scales=quantization.scales,
        rounding=quantization.rounding,
        metric=quantization.metric,
        signed=quantization.signed,
        activation_order=quantization.activation_order,
        mismatch=recipe.calibration.mismatch,
    )


def _store_free(kind: str, weight: Tensor) -> StoredTensor:
    """A matrix without calibration. Wide types gain nothing from a search for scales."""
    if kind in FLOAT_TYPES:
        return StoredTensor.floating(kind, weight)
    fmt = get_format(kind)
    return StoredTensor(kind, quantize_free(weight, fmt, "absmax" if kind == "Q8_0" else "piso"))


def _split(stacked: QuantizedTensor, rows: list[int]) -> Iterator[QuantizedTensor]:
    """Take apart linears that were solved together."""
    scales = {name: value.split(rows) for name, value in stacked.scales.items()}
    for i, codes in enumerate(stacked.codes.split(rows)):
        yield QuantizedTensor(stacked.format, codes, {n: v[i] for n, v in scales.items()})


def _set(block: DecoderBlock, linear: str, weight: Tensor) -> None:
    block.linear(linear).weight = nn.Parameter(weight, requires_grad=False)


def _relative(name: str) -> str:
    return name.split(".", 3)[3].removesuffix(".weight")
