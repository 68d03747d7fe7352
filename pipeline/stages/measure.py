"""Statistics of every site's inputs on calibration text, and the quantizer as a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.architectures.base import HEAD
from pipeline.architectures.spaces import Space
from pipeline.calibration.streams import Stream
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import LayerOptions, quantize_layer
from pipeline.quantization.objective import LayerObjective
from pipeline.recipe import Recipe
from pipeline.stages.load import Source
from pipeline.stages.network_loss import QuantizedNetwork
from pipeline.stages.quantize import WIDE, layer_options
from pipeline.stages.stored import FLOAT_TYPES
from pipeline.stages.walk import HEAD_ROWS, choose_device, store_free
from pipeline.transforms.changes import ReadTensor
from pipeline.transforms.model import Build, Inner, Measure, Measured
from pipeline.transforms.statistics import InputStatistics
from runtimes.torch_reference import DecoderBlock, TorchReference


def measuring(recipe: Recipe, source: Source, windows: Tensor) -> Measure:
    """A pass over the calibration text: one block at a time, the residual stream of all windows.

    Args:
        recipe: Batch and device.
        source: The checkpoint.
        windows: Tokens, int64 [samples, length].
    """
    device = choose_device(recipe.device)

    @torch.inference_mode()
    def measure(read: ReadTensor, inner: Inner, hessian: bool) -> Measured:
        model = TorchReference(
            source.config,
            lambda name: read(name).float(),
            head=source.head,
            device=device,
            inner=inner,
        )
        embedded = model.embed(windows.to(device)).split(recipe.calibration.batch)
        stream = Stream(list(embedded))
        for index in range(model.n_blocks):
            block = model.block(index)
            found = {}
            for site in source.checkpoint.architecture.sites:
                found[site.name] = _site(stream, block, site.name, hessian)
                stream.pass_site(block, site.name)
            yield index, found
        inputs = [model.head_input(residual) for residual in stream.residual]
        yield None, {"head": _sums(inputs, hessian)}

    return measure


def _site(stream: Stream, block: DecoderBlock, site: str, hessian: bool) -> InputStatistics:
    batches = range(len(stream.residual))
    return _sums([stream.site_input(block, site, batch) for batch in batches], hessian)


def _sums(batches: list[Tensor], hessian: bool) -> InputStatistics:
    first = batches[0]
    found = InputStatistics.empty(first.shape[-1], hessian=hessian, device=first.device)
    for inputs in batches:
        found.add(inputs)
    return found.cpu()


def judging(recipe: Recipe, source: Source) -> Callable[[str, Tensor, Tensor], float]:
    """The recipe's quantizer as a judge: the error of a matrix's outputs under its type.

    Nothing is refined or searched twice and no error of blocks before is corrected: those find the
    same matrix a little better, whatever it is.

    Args:
        recipe: Methods and device.
        source: Says the type of each matrix.
    """
    device = choose_device(recipe.device)
    options: LayerOptions = replace(
        layer_options(recipe), refine_rounds=0, orders=1, mismatch=0.0, stream_correction=0.0
    )
    if options.rounding in ("qronos", "gptaq", "gpfq"):  # GPTQ, where no error comes before
        options = replace(options, rounding="gptq")
    damping = recipe.quantization.damping

    @torch.inference_mode()
    def judge(name: str, weight: Tensor, hessian: Tensor) -> float:
        kind = source.plan.types[name]
        if kind in FLOAT_TYPES:
            return 0.0
        H = hessian.to(device)
        objective = LayerObjective.from_moments(H, damping=damping)
        total = 0.0
        for rows in weight.float().split(HEAD_ROWS):
            part = rows.to(device)
            if name == HEAD and kind == WIDE:
                values = store_free(kind, rows).dequantize()
            else:
                found = quantize_layer(part, objective, get_format(kind), options)
                values = found.quantized.dequantize()
            error = (part - values.to(device)).double()
            total += float(((error @ H) * error).sum())
        return total

    return judge


def rounding(recipe: Recipe, source: Source) -> Callable[[str, Tensor], Tensor]:
    """Each matrix to the nearest values of its type, with scales that are best without data.

    Args:
        recipe: Says where.
        source: Says the type of each matrix.
    """
    device = choose_device(recipe.device)

    @torch.inference_mode()
    def rounded(name: str, weight: Tensor) -> Tensor:
        stored = store_free(source.plan.types[name], weight.float().to(device))
        return stored.dequantize().to(weight)

    return rounded


def building(recipe: Recipe, source: Source, windows: Tensor) -> Build:
    """The loss of the whole quantized network on the calibration text.

    Args:
        recipe: Batch and device.
        source: The checkpoint and the type of each matrix.
        windows: Tokens, int64 [samples, length].
    """

    def build(read: ReadTensor, inner: Inner, spaces: Sequence[Space]) -> QuantizedNetwork:
        return QuantizedNetwork(
            source,
            read,
            inner,
            spaces,
            windows,
            batch=recipe.calibration.batch,
            device=choose_device(recipe.device),
        )

    return build
