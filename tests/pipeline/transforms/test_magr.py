"""MagR against its objective, its conditions of optimality and brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.transforms.magr import project_on_l1_balls, reduce_magnitude

GENERATOR = torch.Generator().manual_seed(2)


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def objective(v: Tensor, w: Tensor, H: Tensor, strength: float) -> float:
    penalty = strength * torch.linalg.eigvalsh(H)[-1] * w.abs().max()
    return float((v - w) @ H @ (v - w) / 2 + penalty * v.abs().max())


def test_projection_is_the_nearest_point_of_the_ball() -> None:
    rows, radius = gaussian(6, 3), torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0, 50.0]).double()
    found = project_on_l1_balls(rows, radius)
    assert (found.abs().sum(1) <= radius + 1e-12).all()
    assert torch.equal(found[5], rows[5])
    assert not found[0].any()
    for row, point, r in zip(rows, found, radius, strict=True):
        others = gaussian(20_000, 3)
        others *= (r * torch.rand(20_000, generator=GENERATOR).double() / others.abs().sum(1))[
            :, None
        ]
        assert float((point - row).norm()) <= float((others - row).norm(dim=1).min()) + 1e-12


@pytest.mark.parametrize("strength", [0.001, 0.03, 0.3])
def test_the_objective_falls_to_its_minimum(strength: float) -> None:
    X = gaussian(40, 5)
    H, W = X.T @ X, gaussian(4, 5)
    V = reduce_magnitude(W, H, strength)
    for v, w in zip(V, W, strict=True):
        least = objective(v, w, H, strength)
        assert least < objective(w, w, H, strength)
        for scale in (1e-1, 1e-2, 1e-3):
            for _ in range(200):
                other = v + scale * gaussian(5)
                assert objective(other, w, H, strength) >= least - 1e-9
        assert float(v.abs().max()) < float(w.abs().max())


def test_scales_do_not_matter_and_no_strength_does_nothing() -> None:
    X = gaussian(40, 5)
    H, W = X.T @ X, gaussian(4, 5)
    V = reduce_magnitude(W, H, 0.05)
    torch.testing.assert_close(reduce_magnitude(1e-3 * W, 1e4 * H, 0.05), 1e-3 * V)
    assert torch.equal(reduce_magnitude(W, H, 0.0), W)
    assert torch.equal(reduce_magnitude(W, 0 * H, 0.1), W)
