"""Walk the decoder blocks: measure, solve, and hand each site's error on to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.architectures.base import HEAD
from pipeline.calibration.moments import Moments
from pipeline.calibration.streams import SiteMoments, Stream, site_moments
from pipeline.errors import ResourceError
from pipeline.quantization.formats import Format, QuantizedTensor
from pipeline.quantization.layer import (
    LayerOptions,
    LayerResult,
    quantize_free,
    quantize_layer,
)
from pipeline.quantization.objective import HeldOut, LayerObjective
from pipeline.quantization.tensor_scale import format_for
from pipeline.stages.load import Source
from pipeline.stages.mismatch_share import Estimate, moment_options, solve_with_estimate
from pipeline.stages.stored import FLOAT_TYPES, StoredTensor
from pipeline.transforms.magr import reduce_magnitude
from runtimes.torch_reference import DecoderBlock, TorchReference

HEAD_ROWS = 8192
"""Rows of the output head that are solved together, which bounds memory."""


@dataclass(frozen=True)
class WalkSettings:
    """What the walk needs besides the checkpoint.

    Attributes:
        options: How layers are quantized.
        damping: Fraction of H's mean diagonal that is added to it.
        shrinkage: Ridge penalty on targets, in units of what damping adds.
        held_out: Share of the calibration windows that judges refinements.
        batch: Windows per forward pass.
        device: ``auto`` (a GPU if there is one), ``cpu`` or ``cuda``.
        mismatch_estimate: How the share of the mismatch correction is estimated for each linear,
            see `pipeline.stages.mismatch_share`; ``options.mismatch`` multiplies it.
        seed: Seed of sampled shares.
        magr: Strength of MagR, see `pipeline.transforms.magr`; losses are those of its weights.
        bias_correction: Whether linears that have a bias get the one that makes the mean of their
            outputs right; losses are then about the means.
    """

    options: LayerOptions = field(default_factory=LayerOptions)
    damping: float = 0.01
    shrinkage: float = 0.0
    held_out: float = 0.0
    batch: int = 8
    device: str = "cpu"
    mismatch_estimate: Estimate = "fixed"
    seed: int = 0
    magr: float = 0.0
    bias_correction: bool = False


@dataclass(frozen=True)
class SolvedSite:
    """The matrices of one site by Hugging Face name, and what is to be said of them.

    Attributes:
        stored: The matrices.
        record: Figures for the manifest.
        importance: Mean square of each input, float32 [in], as an importance matrix has it.
        biases: Corrected biases by Hugging Face name, float32 [out].
    """

    stored: dict[str, StoredTensor]
    record: dict[str, Any]
    importance: Tensor
    biases: dict[str, Tensor] = field(default_factory=dict)


class Walk:
    """The float and the quantized model at the input of one block, with their streams.

    Args:
        source: The checkpoint and the type of each matrix.
        embedding: The quantized model's embedding, [vocabulary, hidden].
        windows: Calibration tokens, int64 [samples, length].
        settings: Methods and device.
        token_weights: How much each token counts at a site, [samples, length] by `site_key`; all
            alike where it has none.

    Raises:
        ResourceError: There is no such device.
    """

    def __init__(
        self,
        source: Source,
        embedding: Tensor,
        windows: Tensor,
        settings: WalkSettings,
        token_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._source, self._settings = source, settings
        self._token_weights = token_weights or {}
        self._device = choose_device(settings.device)
        self._moment_options = moment_options(
            settings.mismatch_estimate, settings.held_out, len(windows), settings.seed
        )
        self._float = TorchReference(
            source.config,
            source.read,
            head=source.head,
            device=self._device,
            inner=source.inner,
        )
        windows = windows.to(self._device)
        embedded = nn.functional.embedding(windows, embedding.to(self._device))
        self._quantized_stream = Stream(list(embedded.split(settings.batch)))
        options = settings.options
        two_streams = (
            options.mismatch > 0
            or options.stream_correction > 0
            or options.rounding in ("qronos", "gptaq", "gpfq")
        )
        self._float_stream = (
            Stream(list(self._float.embed(windows).split(settings.batch))) if two_streams else None
        )

    @property
    def n_blocks(self) -> int:
        """Number of decoder blocks."""
        return self._float.n_blocks

    def replay(
        self,
        index: int,
        stored: Mapping[str, StoredTensor],
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Move both streams past a block that was solved before."""
        if self._float_stream is not None:
            self._float_stream.pass_block(self._float.block(index))
        block = self._float.block(index)
        for name, tensor in stored.items():
            _set(block, _relative(name), tensor.dequantize().to(self._device))
        _set_biases(block, biases or {})
        self._quantized_stream.pass_block(block)

    def solve(self, index: int) -> Iterator[SolvedSite]:
        """Quantize one block site by site and move both streams past it."""
        quantized = self._float.block(index)
        reference = self._float.block(index) if self._float_stream is not None else None
        for site in self._source.checkpoint.architecture.sites:
            moments = self._moments(index, site.name, quantized, reference)
            solved = self._solve_site(index, site.name, site.linears, quantized, moments)
            for name, tensor in solved.stored.items():
                _set(quantized, _relative(name), tensor.dequantize().to(self._device))
            _set_biases(quantized, solved.biases)
            self._quantized_stream.pass_site(quantized, site.name)
            if reference is not None and self._float_stream is not None:
                self._float_stream.pass_site(reference, site.name)
            yield solved

    def solve_head(self) -> SolvedSite:
        """Quantize an output head that is a matrix of its own, once all blocks are passed."""
        name = "output head"
        norm = _FinalNorm(self._float)
        other = None if self._float_stream is None else (norm, self._float_stream)
        quantized = (norm, self._quantized_stream)
        moments = site_moments("head", quantized, other, name, self._moment_options)
        objective = self._objective(moments)
        kind = self._source.plan.types[HEAD]
        weight = self._source.read(HEAD).to(self._device)
        if self._settings.magr:
            smaller = reduce_magnitude(weight, moments.solving.hessian, self._settings.magr)
            weight = smaller.to(weight)
        fmt = format_for(kind, weight)
        results = [self._solve([rows], fmt, moments, objective) for rows in weight.split(HEAD_ROWS)]
        stored = {HEAD: StoredTensor(kind, _joined([r.quantized for r in results]))}
        record = _record(self.n_blocks, "head", results, moments.solving.tokens, objective)
        energies = [float(r.loss.sum()) / max(r.relative_loss, 1e-300) for r in results]
        record["loss"] = sum(float(r.loss.sum()) for r in results) / max(sum(energies), 1e-300)
        return SolvedSite(stored, record, _mean_squares(moments))

    def _moments(
        self, index: int, site: str, quantized: DecoderBlock, reference: DecoderBlock | None
    ) -> SiteMoments:
        other = (
            (reference, self._float_stream)
            if reference is not None and self._float_stream is not None
            else None
        )
        return site_moments(
            site,
            (quantized, self._quantized_stream),
            other,
            f"block {index}, site {site}",
            self._moment_options,
            self._token_weights.get(site_key(index, site)),
        )

    def _objective(self, moments: SiteMoments) -> LayerObjective:
        solving = moments.solving
        return LayerObjective.from_moments(
            solving.hessian,
            solving.cross,
            solving.residual,
            damping=self._settings.damping,
            shrinkage=self._settings.shrinkage,
        )

    def _solve_site(
        self,
        index: int,
        site: str,
        linears: tuple[str, ...],
        block: DecoderBlock,
        moments: SiteMoments,
    ) -> SolvedSite:
        uncentred = moments
        if self._settings.bias_correction and all(
            block.linear(name).bias is not None for name in linears
        ):
            moments = moments.centred()
        objective = self._objective(moments)
        prefix = self._source.checkpoint.architecture.block_prefix(index)
        weights = {f"{prefix}{name}.weight": block.linear(name).weight for name in linears}
        kinds = {name: self._source.plan.types[name] for name in weights}
        if self._settings.magr:
            for name in (n for n in weights if kinds[n] not in FLOAT_TYPES):
                hessian = moments.solving.hessian
                smaller = reduce_magnitude(weights[name], hessian, self._settings.magr)
                weights[name] = smaller.to(weights[name])
        stored: dict[str, StoredTensor] = {}
        results: list[LayerResult] = []
        formats = {n: (kinds[n], _format(kinds[n], w)) for n, w in weights.items()}
        for kind, fmt in dict.fromkeys(formats.values()):
            names = [name for name in weights if formats[name] == (kind, fmt)]
            if fmt is None:
                stored |= {n: StoredTensor.floating(kind, weights[n].cpu()) for n in names}
                continue
            result = self._solve([weights[n] for n in names], fmt, moments, objective)
            results.append(result)
            parts = split_rows(result.quantized, [len(weights[n]) for n in names])
            stored |= {n: StoredTensor(kind, p) for n, p in zip(names, parts, strict=True)}
        record = _record(index, site, results, moments.solving.tokens, objective)
        biases: dict[str, Tensor] = {}
        if self._settings.bias_correction:
            share = self._settings.options.stream_correction
            biases = _corrected_biases(block, stored, uncentred.solving, share)
        return SolvedSite(stored, record, _mean_squares(uncentred), biases)

    def _solve(
        self, weights: list[Tensor], fmt: Format, moments: SiteMoments, objective: LayerObjective
    ) -> LayerResult:
        """Solve linears of one format that share their inputs."""
        apart = moments.held_out
        judge = None if apart is None else HeldOut(apart.hessian, apart.cross, apart.residual)
        return solve_with_estimate(
            weights,
            moments,
            objective,
            partial(
                quantize_layer,
                objective=objective,
                fmt=fmt,
                options=self._settings.options,
                held_out=judge,
            ),
            self._settings.mismatch_estimate,
            self._settings.options.mismatch,
            self._settings.damping,
        )


def _format(kind: str, weight: Tensor) -> Format | None:
    return None if kind in FLOAT_TYPES else format_for(kind, weight)


class _FinalNorm:
    """The final norm as a block whose only site is the head."""

    def __init__(self, model: TorchReference) -> None:
        self._model = model

    def site_input(self, site: str, residual: Tensor, heads: Tensor | None = None) -> Tensor:
        """Input of the head, [batch, length, hidden]."""
        return self._model.head_input(residual)


def _set_biases(block: DecoderBlock, biases: Mapping[str, Tensor]) -> None:
    for name, bias in biases.items():
        linear = block.linear(name.split(".", 3)[3].removesuffix(".bias"))
        linear.bias = nn.Parameter(bias.to(linear.weight.device), requires_grad=False)


def _corrected_biases(
    block: DecoderBlock, stored: Mapping[str, StoredTensor], moments: Moments, share: float
) -> dict[str, Tensor]:
    """``b + W mean(x) - V mean(x_q)``, and a share of what the stream lost in the mean: the best
    intercepts, given the codes."""
    x, xq, lost = (
        moments.sums[n] / (moments.weight or 1.0) for n in ("reference", "quantized", "lost")
    )
    found = {}
    for name, tensor in stored.items():
        linear = block.linear(_relative(name))
        if linear.bias is None:
            continue
        V = tensor.dequantize().to(linear.weight.device).double()
        bias = linear.bias.double() + linear.weight.double() @ x - V @ xq
        if len(lost):
            bias += share * lost
        found[name.removesuffix("weight") + "bias"] = bias.float().cpu()
    return found


def _mean_squares(moments: SiteMoments) -> Tensor:
    return (moments.solving.hessian.diagonal() / (moments.solving.weight or 1.0)).float().cpu()


def _joined(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Rows that were solved apart, on the CPU."""
    scales = {n: torch.cat([p.scales[n] for p in parts]).cpu() for n in parts[0].scales}
    return QuantizedTensor(parts[0].format, torch.cat([p.codes for p in parts]).cpu(), scales)


def site_key(index: int, site: str) -> str:
    """Name of a block's site."""
    return f"{index}.{site}"


def choose_device(wanted: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means on this machine.

    Raises:
        ResourceError: A GPU is asked for and PyTorch sees none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "no GPU: PyTorch sees no CUDA device",
            fix="install a CUDA build of torch and a driver, or use --set device=cpu",
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def _record(
    index: int,
    site: str,
    results: list[LayerResult],
    tokens: int,
    objective: LayerObjective,
) -> dict[str, Any]:
    return {
        "block": index,
        "site": site,
        "loss": sum(result.relative_loss for result in results),
        "refined": [result.refined[result.refine_kept] for result in results],
        "refine_rounds": [result.refine_kept for result in results],
        "tokens": tokens,
        "dead_inputs": objective.dead_inputs,
        "damping_raised": objective.damping_raised,
    }


def store_free(kind: str, weight: Tensor) -> StoredTensor:
    """A matrix without calibration. Wide types gain nothing from a search for scales."""
    if kind in FLOAT_TYPES:
        return StoredTensor.floating(kind, weight)
    fmt = format_for(kind, weight)
    return StoredTensor(kind, quantize_free(weight, fmt, "absmax" if kind == "Q8_0" else "piso"))


def split_rows(stacked: QuantizedTensor, rows: list[int]) -> Iterator[QuantizedTensor]:
    """Take apart linears that were solved together, on the CPU."""
    scales = {name: value.split(rows) for name, value in stacked.scales.items()}
    for i, codes in enumerate(stacked.codes.split(rows)):
        fields = {name: value[i].cpu() for name, value in scales.items()}
        yield QuantizedTensor(stacked.format, codes.cpu(), fields)


def _set(block: DecoderBlock, linear: str, weight: Tensor) -> None:
    block.linear(linear).weight = nn.Parameter(weight, requires_grad=False)


def _relative(name: str) -> str:
    return name.split(".", 3)[3].removesuffix(".weight")
