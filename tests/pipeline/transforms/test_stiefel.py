"""Learning rotations: gradients against finite differences, steps against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.transforms.operators import random_orthogonal
from pipeline.transforms.stiefel import Linear, cayley_step, learn_rotation, total_loss

GENERATOR = torch.Generator().manual_seed(11)
N = 12


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def rounded(weight: Tensor) -> Tensor:
    step = weight.abs().amax(1, keepdim=True) / 3
    return (weight / step).round() * step


def linear(reads: bool) -> Linear:
    shape = (20, N) if reads else (N, 16)
    X = gaussian(200, shape[1])
    X[:, 0] *= 20
    return Linear(gaussian(*shape), X.T @ X, reads, rounded)


@pytest.mark.parametrize("reads", [True, False])
def test_the_loss_is_the_error_of_the_outputs(reads: bool) -> None:
    """Of a model whose inputs or outputs are rotated, computed from inputs one by one."""
    X = gaussian(300, N if reads else 16)
    W = gaussian(7, N) if reads else gaussian(N, 16)
    one = Linear(W, X.T @ X, reads, rounded)
    A = random_orthogonal(N, GENERATOR)
    Q = rounded(one.rotated(A))
    outputs, wanted = ((X @ A.T) @ Q.T, X @ W.T) if reads else (X @ Q.T, X @ W.T @ A.T)
    relative = (outputs - wanted).square().sum() / wanted.square().sum()
    assert one.loss_and_gradient(A, Q)[0] == pytest.approx(float(relative), rel=1e-10)


@pytest.mark.parametrize("reads", [True, False])
def test_gradients_are_differences(reads: bool) -> None:
    one, A = linear(reads), random_orthogonal(N, GENERATOR)
    Q = rounded(one.rotated(A))
    _, gradient = one.loss_and_gradient(A, Q)
    for _ in range(5):
        direction = gaussian(N, N)
        up, down = (one.loss_and_gradient(A + h * direction, Q)[0] for h in (1e-5, -1e-5))
        expected = float((gradient * direction).sum())
        assert (up - down) / 2e-5 == pytest.approx(expected, rel=1e-6)


def test_steps_stay_orthogonal_and_start_along_the_tangent() -> None:
    A, G = random_orthogonal(N, GENERATOR), gaussian(N, N)
    for rate in (1e-3, 0.5, 10.0):
        stepped = cayley_step(A, G, rate)
        torch.testing.assert_close(stepped @ stepped.T, torch.eye(N).double(), rtol=0, atol=1e-12)
    small = 1e-6
    tangent = G @ A.T @ A - A @ G.T @ A
    moved = (cayley_step(A, G, small) - A) / small
    torch.testing.assert_close(moved, -tangent, rtol=1e-4, atol=1e-4)
    assert torch.allclose(cayley_step(A, A.clone(), 1.0), A, atol=1e-12)  # normal, not tangent


def test_a_hidden_rotation_is_found_again() -> None:
    """Weights on a grid, rotated a little away from it: learning goes back and the loss falls."""
    hidden = cayley_step(torch.eye(N).double(), gaussian(N, N), 0.05)
    grid = rounded(gaussian(60, N))
    one = Linear(grid @ hidden, torch.eye(N).double(), True, rounded)
    assert total_loss(hidden, [one]) < 1e-20
    start = torch.eye(N).double()
    found, first, least = learn_rotation(start, [[one]], steps=200, rate=0.1)
    assert first == pytest.approx(total_loss(start, [one]))
    assert least == pytest.approx(total_loss(found, [one]))
    assert least < 0.05 * first


def test_never_worse_than_the_start_and_the_same_each_time() -> None:
    groups = [[linear(True), linear(False)], [linear(True)]]
    start = random_orthogonal(N, GENERATOR)
    found, first, least = learn_rotation(start, groups, steps=7, rate=5.0)
    assert least <= first
    assert least == pytest.approx(total_loss(found, [*groups[0], *groups[1]]))
    again = learn_rotation(start, groups, steps=7, rate=5.0)
    assert torch.equal(again[0], found)
    assert learn_rotation(start, groups, steps=30, rate=0.1)[2] < first
