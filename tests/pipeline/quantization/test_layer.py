"""`quantize_layer`: options do what they say, and more work never gives a worse layer."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import LayerOptions, Rounding, Scales, quantize_layer
from pipeline.quantization.objective import LayerObjective
from pipeline.quantization.rounding.groupwise import solve_groupwise
from tests.pipeline.quantization.problems import correlated


def problem(rows: int = 24, width: int = 128) -> tuple[torch.Tensor, LayerObjective]:
    """Weights and moments of a quantized stream that differs from the float one."""
    rng = np.random.default_rng(8)
    X = correlated(rng, width, 800)
    Xq = X + 0.1 * X.std(0) * rng.standard_normal(X.shape)
    W = torch.tensor(rng.standard_t(4, (rows, width)))
    return W, LayerObjective.from_moments(torch.tensor(Xq.T @ Xq), torch.tensor(Xq.T @ X))


@pytest.mark.parametrize("scales", get_args(Scales))
@pytest.mark.parametrize("rounding", get_args(Rounding))
def test_every_pair_of_scales_and_rounding(rounding: Rounding, scales: Scales) -> None:
    """Each gives finite weights on the lattice, and repeats bit for bit."""
    W, objective = problem()
    options = LayerOptions(scales=scales, rounding=rounding, refine_rounds=1)
    first, second = (
        quantize_layer(W, objective, get_format("Q2_0"), options).quantized for _ in range(2)
    )
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales["d"], first.scales["d"].half().float())
    values = first.dequantize().double()
    target = objective.target(W)
    energy = ((target @ objective.hessian) * target).sum()
    assert objective.loss(values, target).sum() < 0.4 * energy


@pytest.mark.parametrize("name", ["Q2_0", "Q4_1", "INT3_G32"])
def test_layer_interleaving_keeps_the_scales_that_were_found_first(name: str) -> None:
    W, objective = problem()
    fmt = get_format(name)
    options = LayerOptions(interleave="layer", passes=2)
    result = quantize_layer(W, objective, fmt, options)
    alone = solve_groupwise(objective.target(W), objective.hessian, fmt, options.rule(), passes=2)
    assert all(torch.equal(result.quantized.scales[n], alone.scales[n]) for n in alone.scales)
    assert not torch.equal(result.quantized.codes, alone.codes)


@pytest.mark.parametrize("name", ["Q2_0", "Q4_0", "Q6_K"])
def test_more_orders_never_hurt_a_row(name: str) -> None:
    W, objective = problem(width=512)
    fmt = get_format(name)
    losses = [
        quantize_layer(W, objective, fmt, LayerOptions(orders=n, seed=1)).loss for n in (1, 2, 4)
    ]
    assert (losses[1] <= losses[0]).all()
    assert (losses[2] <= losses[1]).all()
    assert losses[2].sum() < losses[0].sum()
    other = quantize_layer(W, objective, fmt, LayerOptions(orders=4, seed=2)).loss
    assert not torch.equal(other, losses[2])


def test_the_chain_is_ordered_as_it_should_be() -> None:
    """absmax > published PiSO > signed in the Schur metric > refined; look-ahead helps both."""
    W, objective = problem(rows=64, width=256)
    fmt = get_format("INT2_G32")
    base = LayerOptions(signed=False, metric="block")
    ours = replace(base, signed=True, metric="schur")

    def total(options: LayerOptions) -> float:
        return float(quantize_layer(W, objective, fmt, options).loss.sum())

    absmax, published = total(replace(base, scales="absmax")), total(base)
    signed, refined = total(ours), total(replace(ours, refine_rounds=6))
    ahead = total(replace(ours, scales="lookahead"))
    both = total(replace(ours, scales="lookahead", refine_rounds=6))
    assert refined < 0.9 * signed < 0.9 * published < 0.9 * absmax
    assert ahead < 0.95 * signed
    assert both < refined


def test_a_share_of_one_row_moves_that_row_alone() -> None:
    W, objective = problem()
    shares = torch.zeros(len(W), 1)
    shares[3] = 1.0
    target = objective.target(W, shares)
    torch.testing.assert_close(target[3], objective.target(W, 1.0)[3])
    torch.testing.assert_close(target[:3], W[:3])
