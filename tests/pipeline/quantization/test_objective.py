"""Damping, dead inputs, targets and the errors that name a cause."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.errors import InputError, UnsupportedError
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import LayerOptions, quantize_layer
from pipeline.quantization.objective import LayerObjective
from tests.pipeline.quantization.problems import correlated


def streams(seed: int = 0, width: int = 12, tokens: int = 80):
    rng = np.random.default_rng(seed)
    X = correlated(rng, width, tokens)
    Xq = X + 0.1 * rng.standard_normal(X.shape)
    return torch.tensor(X), torch.tensor(Xq), torch.tensor(rng.standard_normal((5, width)))


def test_the_full_target_is_the_least_squares_solution() -> None:
    X, Xq, W = streams()
    objective = LayerObjective.from_moments(Xq.T @ Xq, Xq.T @ X, damping=0)
    expected = torch.linalg.lstsq(Xq, X @ W.T).solution.T
    torch.testing.assert_close(objective.target(W, 1.0), expected, rtol=1e-6, atol=1e-8)


def test_the_target_moves_linearly_with_alpha_and_starts_at_the_weights() -> None:
    X, Xq, W = streams()
    objective = LayerObjective.from_moments(Xq.T @ Xq, Xq.T @ X)
    full = objective.target(W, 1.0)
    torch.testing.assert_close(objective.target(W, 0.0), W)
    torch.testing.assert_close(objective.target(W, 0.5), (W + full) / 2)


def test_equal_streams_leave_the_weights_alone_whatever_the_damping() -> None:
    X, _, W = streams()
    objective = LayerObjective.from_moments(X.T @ X, X.T @ X, damping=0.3)
    torch.testing.assert_close(objective.target(W, 1.0), W, rtol=1e-10, atol=1e-10)


def test_shrinkage_is_ridge_regression() -> None:
    """Least squares with rows of the square root of the penalty that ask for zeros."""
    X, Xq, W = streams()
    objective = LayerObjective.from_moments(Xq.T @ Xq, Xq.T @ X, damping=0.1, shrinkage=1.0)
    penalty = 0.1 * (Xq.T @ Xq).diagonal().mean()
    extra = penalty.sqrt() * torch.eye(X.shape[1], dtype=X.dtype)
    asked = torch.cat([X @ W.T, torch.zeros(X.shape[1], len(W), dtype=X.dtype)])
    expected = torch.linalg.lstsq(torch.cat([Xq, extra]), asked).solution.T
    torch.testing.assert_close(objective.target(W, 1.0), expected, rtol=1e-6, atol=1e-8)
    symmetric = LayerObjective.from_moments(Xq.T @ Xq, damping=0.1, shrinkage=1.0)
    assert (symmetric.target(W).norm(dim=1) < W.norm(dim=1)).all()


def test_the_loss_is_the_output_error_up_to_a_constant() -> None:
    X, Xq, W = streams()
    objective = LayerObjective.from_moments(Xq.T @ Xq, Xq.T @ X, damping=0)
    target = objective.target(W, 1.0)
    a, b = W + 0.1, W * 0.9

    def output_error(V: torch.Tensor) -> torch.Tensor:
        return (X @ W.T - Xq @ V.T).square().sum(0)

    difference = objective.loss(a, target) - objective.loss(b, target)
    torch.testing.assert_close(difference, output_error(a) - output_error(b), rtol=1e-6, atol=1e-6)


def test_the_stream_correction_is_least_squares_with_what_the_stream_lost() -> None:
    X, Xq, W = streams()
    D = torch.randn(len(X), len(W), dtype=X.dtype, generator=torch.Generator().manual_seed(5))
    objective = LayerObjective.from_moments(Xq.T @ Xq, Xq.T @ X, Xq.T @ D, damping=0)
    expected = torch.linalg.lstsq(Xq, D + X @ W.T).solution.T
    torch.testing.assert_close(objective.target(W, 1.0, 1.0), expected, rtol=1e-6, atol=1e-8)
    half = (objective.target(W, 1.0, 0.0) + expected) / 2
    torch.testing.assert_close(objective.target(W, 1.0, 0.5), half, rtol=1e-6, atol=1e-8)


def test_factors_reproduce_h_and_its_inverse_in_any_order() -> None:
    X, _, _ = streams()
    objective = LayerObjective.from_moments(X.T @ X)
    columns = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    factor = objective.factor(columns)
    H = objective.hessian[columns][:, columns]
    torch.testing.assert_close(factor.root @ factor.root.T, H)
    U = factor.inverse_root
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(H))
    assert torch.equal(U, U.triu())


def test_dead_and_rank_deficient_inputs_are_damped_and_counted() -> None:
    X, _, W = streams(tokens=6)
    X[:, 3] = 0
    objective = LayerObjective.from_moments(X.T @ X)
    assert objective.dead_inputs == 1
    assert objective.damping_raised == 0
    result = quantize_layer(W, objective, get_format("INT4_G4"), LayerOptions())
    assert torch.isfinite(result.quantized.dequantize()).all()


def test_all_dead_inputs_fall_back_to_the_identity() -> None:
    objective = LayerObjective.from_moments(torch.zeros(8, 8))
    assert objective.dead_inputs == 8
    W = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    result = quantize_layer(W, objective, get_format("INT8_G8"), LayerOptions())
    torch.testing.assert_close(result.quantized.dequantize(), W, rtol=0.05, atol=0.02)


def test_the_damping_ladder_is_climbed_for_an_indefinite_matrix() -> None:
    H = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=torch.float64))
    objective = LayerObjective.from_moments(H, damping=0.01)
    assert objective.damping_raised == 1
    assert objective.damping == pytest.approx(0.1 * H.diagonal().mean().item())


def test_a_hopeless_matrix_is_an_error() -> None:
    H = torch.diag(torch.tensor([1.0, -50.0, 60.0], dtype=torch.float64))
    with pytest.raises(InputError, match="not positive definite"):
        LayerObjective.from_moments(H, damping=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["H", "G", "C"])
def test_a_non_finite_matrix_is_named(which: str, value: float) -> None:
    matrices = {"H": torch.eye(4), "G": torch.eye(4), "C": torch.zeros(4, 6)}
    matrices[which][1, 2] = value
    with pytest.raises(InputError, match=f"matrix {which} holds NaN or Inf"):
        LayerObjective.from_moments(*matrices.values())


def test_a_width_that_does_not_divide_is_refused() -> None:
    objective = LayerObjective.identity(48)
    with pytest.raises(UnsupportedError, match="rows of 48 weights"):
        quantize_layer(torch.randn(2, 48), objective, get_format("Q2_0"), LayerOptions())
