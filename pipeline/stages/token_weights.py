"""How much each calibration token counts in H: by the gradient of the loss at the site's outputs.

``H = sum_t w_t x_t x_t'`` with ``w_t = (|g_t|^2)^e``, g the gradient of the negative log-likelihood
of a sampled label with respect to the outputs of the site's linears. e = 1 is the layer-wise
objective of GuidedQuant (arXiv 2505.07004, section 3.1, one group of outputs), the expected squared
change of the loss to second order if g does not depend on the direction of the error. Its weights
are so uneven that few tokens decide (in the first block 2 % of them); e = 1/2 keeps most of the
order and of the text. No preset uses either: over three seeds no gain was larger than the spread.

The float model is run forward and backward over as many windows at once as keep their residual
streams at all blocks within `STREAM_BYTES`; the weights of each block are read twice for each such
part of the text.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.gradients import inputs_and_gradients, sampled_gradient
from pipeline.stages.load import Source
from pipeline.stages.walk import choose_device, site_key
from runtimes.torch_reference import TorchReference

STREAM_BYTES = 2**31
"""Most memory for residual streams at the inputs of all blocks."""

PART = "token-weights"


def token_weights(
    source: Source, windows: Tensor, recipe: Recipe, run: RunDirectory, progress: Progress
) -> dict[str, Tensor]:
    """Weights of all tokens at all sites; what an earlier run has measured is not done again.

    Args:
        source: The checkpoint.
        windows: Calibration tokens, int64 [samples, length].
        recipe: The exponent, batch, device and seed.
        run: Where they are kept.
        progress: A block is one backward through a block.

    Returns:
        By `site_key`, float32 [samples, length] of mean 1.
    """
    loaded = run.load(PART)
    if loaded is not None:
        return loaded[0]
    progress.phase("gradients")
    device = choose_device(recipe.device)
    model = TorchReference(
        source.config, source.read, head=source.head, device=device, inner=source.inner
    )
    batch = recipe.calibration.batch
    at_once = _windows_at_once(windows.shape[1], source, batch)
    squares: dict[str, list[Tensor]] = {}
    parts = windows.split(at_once)
    generator = torch.Generator().manual_seed(recipe.seed)
    for number, part in enumerate(parts):
        found = _squared_gradients(source, model, part.to(device), batch, generator)
        for done, (index, sites) in enumerate(found):
            progress.block(number * model.n_blocks + done + 1, len(parts) * model.n_blocks)
            for site, values in sites.items():
                squares.setdefault(site_key(index, site), []).append(values)
    exponent = recipe.calibration.gradient_weighting
    weights = {key: _normalized(torch.cat(values), exponent) for key, values in squares.items()}
    run.store(PART, weights)
    return weights


def _windows_at_once(length: int, source: Source, batch: int) -> int:
    size = source.checkpoint.architecture.dimensions(source.checkpoint.config)
    streams = 4 * (size.layers + 1) * length * size.hidden
    return max(1, STREAM_BYTES // (streams * batch)) * batch


def _squared_gradients(
    source: Source,
    model: TorchReference,
    tokens: Tensor,
    batch: int,
    generator: torch.Generator,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """From the last block to the first: its index, and for each site the sums over its outputs of
    squared gradients, [samples, length]."""
    with torch.no_grad():
        streams = [model.embed(tokens)]
        for index in range(model.n_blocks):
            block = model.block(index)
            streams.append(torch.cat([block(part) for part in streams[-1].split(batch)]))
    head = source.read(source.head).to(tokens.device)
    gradient = sampled_gradient(model, head, streams.pop(), generator)
    sites = source.checkpoint.architecture.sites
    linears = source.checkpoint.architecture.linears
    for index in reversed(range(model.n_blocks)):
        block = model.block(index)
        before: list[Tensor] = []
        squares: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        for part, after in zip(streams.pop().split(batch), gradient.split(batch), strict=True):
            first, found = inputs_and_gradients(block, linears, part, after)
            before.append(first)
            for site in sites:
                outputs = torch.cat([found[linear][1] for linear in site.linears], dim=1)
                squares[site.name].append(outputs.square().sum(1).reshape(part.shape[:2]).cpu())
        gradient = torch.cat(before)
        yield index, {site: torch.cat(values) for site, values in squares.items()}


def _normalized(squares: Tensor, exponent: float) -> Tensor:
    weights = squares.double().pow(exponent)
    mean = weights.mean()
    return (weights / mean if mean > 0 else torch.ones_like(weights)).float()
