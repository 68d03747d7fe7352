"""Orders against the published algorithm, against enumeration, and the bounds that they are for."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.transforms.operators import hadamard_rotation
from pipeline.transforms.orders import (
    alike_blocks,
    block_mass,
    falling,
    mass_diffusion,
    zigzag,
)

SCORES = st.lists(st.floats(0.01, 100), min_size=12, max_size=12, unique=True)


def published(tokens: Tensor, block: int) -> Tensor:
    """MixQuant's algorithm 1 as it is written: norms token by token, means of candidates."""
    X = tokens.abs()
    channels = X.shape[1]
    order = X.mean(0).argsort(descending=True).tolist()
    count = channels // block
    members = [[order[k]] for k in range(count)]
    norms = [X[:, order[k]].clone() for k in range(count)]
    full = [block == 1] * count
    for channel in order[count:]:
        means = [
            torch.inf if full[k] else float((norms[k] + X[:, channel]).mean()) for k in range(count)
        ]
        k = means.index(min(means))
        members[k].append(channel)
        norms[k] = norms[k] + X[:, channel]
        full[k] = len(members[k]) == block
    return torch.tensor(members).flatten()


@pytest.mark.parametrize(("channels", "block"), [(24, 4), (24, 1), (24, 24), (64, 16), (30, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_mass_diffusion_is_the_published_algorithm(channels: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(50, channels, generator=generator, dtype=torch.float64)
    tokens *= torch.exp(1.5 * torch.randn(channels, generator=generator, dtype=torch.float64))
    wanted = published(tokens, block).reshape(-1, block)
    found = mass_diffusion(tokens.abs().mean(0), block).reshape(-1, block)
    assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in wanted.tolist()}


@settings(deadline=None)
@given(SCORES)
def test_orders_are_permutations(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    for order in (
        mass_diffusion(scores, 3),
        zigzag(scores, 4),
        falling(scores),
        alike_blocks(scores, scores.flip(0), 3),
    ):
        assert sorted(order.tolist()) == list(range(12))


@settings(deadline=None)
@given(SCORES)
def test_mass_diffusion_is_near_the_best_of_all_orders(values: list[float]) -> None:
    """Longest processing time first: at most 4/3 - 1/(3 m) of the least possible largest mass
    without the limit on sizes (Graham 1969). Six channels in blocks of 2: pairing is optimal."""
    scores = torch.tensor(values[:6], dtype=torch.float64)
    found = float(block_mass(scores[mass_diffusion(scores, 2)], 2).max())
    least = min(
        float(block_mass(scores[torch.tensor(order)], 2).max()) for order in permutations(range(6))
    )
    assert found <= least * (4 / 3) + 1e-9


@settings(deadline=None)
@given(SCORES)
def test_falling_order_is_the_worst_for_blocks(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float64)

    def worst(order: Tensor) -> float:
        return float(block_mass(scores[order], 4).max())

    for order in (mass_diffusion(scores, 4), zigzag(scores, 4), torch.arange(12)):
        assert worst(order) <= worst(falling(scores)) + 1e-9


def test_alike_blocks() -> None:
    """Sizes decide who shares a block, masses which block is first."""
    sizes = torch.tensor([1.0, 9.0, 2.0, 8.0, 1.5, 9.5])
    mass = torch.tensor([7.0, 0.1, 7.0, 0.1, 7.0, 0.1])
    order = alike_blocks(sizes, mass, 3).reshape(2, 3)
    assert order.tolist() == [[2, 4, 0], [5, 1, 3]]


def test_zigzag_by_hand() -> None:
    scores = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert zigzag(scores, 3).reshape(2, 3).tolist() == [[0, 3, 4], [1, 2, 5]]


@pytest.mark.parametrize("block", [4, 16])
def test_the_bound_holds_and_is_reached(block: int) -> None:
    """``|H x|_inf <= |x|_1 / sqrt(b)``, with equality where signs align: here x is a row of H."""
    rotation = hadamard_rotation(block, block, torch.Generator().manual_seed(3))
    x = torch.randn(1000, block, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bound = x.abs().sum(1) / block**0.5
    assert (rotation.forward(x).abs().amax(1) <= bound + 1e-12).all()
    row = rotation.forward(torch.eye(block, dtype=torch.float64)).T[2]
    aligned = float(rotation.forward(row).abs().max())
    assert aligned == pytest.approx(float(row.abs().sum()) / block**0.5, rel=1e-12)
