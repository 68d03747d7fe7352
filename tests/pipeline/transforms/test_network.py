"""Descent on several rotations at once, on losses whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.transforms.network import Descent, largest_singular, learn, split_windows
from pipeline.transforms.operators import random_orthogonal

GENERATOR = torch.Generator().manual_seed(21)
HOW = Descent(steps=60, rate=0.3, batch=2, momentum=0.5, seed=1)


def stack(units: int, order: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return random_orthogonal(order, generator, units).reshape(units, order, order)


class Distance:
    """Squared distance from hidden rotations, to which every window adds noise of its own.

    Args:
        wanted: What is hidden.
        noise: Size of the windows' noise.
        windows: How many.
        flipped: Whether the windows that judge want to go the other way.
    """

    device = torch.device("cpu")

    def __init__(
        self, wanted: Sequence[Tensor], noise: float, windows: int = 16, *, flipped: bool = False
    ) -> None:
        self.wanted, self.windows = list(wanted), windows
        self.noise = [
            [noise * torch.randn(w.shape, dtype=torch.float64, generator=GENERATOR) for w in wanted]
            for _ in range(windows)
        ]
        self.flipped = set(split_windows(windows)[1]) if flipped else set()
        self.seen: list[list[int]] = []

    def target(self, window: int) -> list[Tensor]:
        return [w + n for w, n in zip(self.wanted, self.noise[window], strict=True)]

    def loss(self, matrices: Sequence[Tensor], which: Sequence[int]) -> float:
        total = 0.0
        for window in which:
            sign = -1 if window in self.flipped else 1
            pairs = zip(matrices, self.target(window), strict=True)
            total += sign * sum(float((A - T).square().sum()) for A, T in pairs)
        return total / len(which)

    def gradients(
        self, matrices: Sequence[Tensor], which: Sequence[int]
    ) -> tuple[float, list[Tensor]]:
        self.seen.append(list(which))
        found = []
        for index, A in enumerate(matrices):
            parts = [2 * (A - self.target(window)[index]) for window in which]
            found.append(torch.stack(parts).mean(0))
        return self.loss(matrices, which), found


def near(matrices: Tensor, seed: int, size: float) -> Tensor:
    """Rotations a little away: by the exponential of a skew matrix, not by Cayley's."""
    skew = torch.randn(
        matrices.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return torch.linalg.matrix_exp(size * (skew - skew.mT)) @ matrices


def test_hidden_rotations_are_found() -> None:
    starts = [stack(1, 10), stack(3, 4, 1)]
    hidden = [near(one, 5 + n, 0.1) for n, one in enumerate(starts)]
    network = Distance(hidden, 0.0)
    found = learn(starts, [0, 1], network, HOW)
    assert found.first == pytest.approx(network.loss(starts, [0]))
    assert found.least == pytest.approx(network.loss(found.matrices, [0]))
    assert found.least < 1e-3 * found.first
    assert found.step == HOW.steps


@pytest.mark.parametrize("rate", [1e-3, 1.0, 30.0])
def test_matrices_stay_orthogonal(rate: float) -> None:
    starts = [stack(1, 12), stack(2, 6, 1)]
    network = Distance([stack(1, 12, 7), stack(2, 6, 8)], 0.5)
    seen: list[Tensor] = []
    gradients = network.gradients

    def watched(matrices: Sequence[Tensor], which: Sequence[int]) -> tuple[float, list[Tensor]]:
        seen.extend(matrices)
        return gradients(matrices, which)

    network.gradients = watched  # type: ignore[method-assign]
    learn(starts, [0, 1], network, Descent(300, rate, 2, 0.9, 0))
    for A in seen[-2:]:
        unit = torch.eye(A.shape[-1]).double().expand_as(A)
        torch.testing.assert_close(A @ A.mT, unit, rtol=0, atol=1e-12)
    assert not torch.allclose(seen[-1], starts[1], atol=1e-3)


def test_never_worse_than_the_start_by_the_windows_that_judge() -> None:
    """They want the opposite of the others: every step makes it worse for them."""
    starts = [stack(1, 8)]
    network = Distance([near(starts[0], 3, 0.1)], 0.0, flipped=True)
    found = learn(starts, [0], network, HOW)
    assert found.step == 0
    assert found.least == found.first
    assert torch.equal(found.matrices[0], starts[0])


def test_windows_that_judge_are_never_learned_from_and_the_others_in_turn() -> None:
    network = Distance([stack(1, 4, 2)], 0.1, windows=17)
    train, judges = split_windows(17)
    assert sorted(train + judges) == list(range(17))
    assert len(judges) == 2
    learn([stack(1, 4)], [0], network, Descent(10, 0.1, 3, 0.0, 4))
    drawn = [window for which in network.seen for window in which]
    assert all(len(which) == 3 for which in network.seen)
    assert sorted(drawn[:15]) == train
    assert sorted(drawn[15:]) != drawn[15:]
    for count, judging in ((2, [1]), (3, [1]), (9, [4])):
        assert split_windows(count)[1] == judging
    for count in (0, 1):
        with pytest.raises(ValueError, match="one to judge by"):
            split_windows(count)


def test_seeds_decide_and_repeat() -> None:
    def run(seed: int) -> Tensor:
        network = Distance([stack(1, 6, 2)], 0.0)
        torch.manual_seed(0)
        network.noise = [[torch.randn(1, 6, 6).double()] for _ in range(16)]
        return learn([stack(1, 6)], [0], network, Descent(12, 0.2, 2, 0.9, seed)).matrices[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_the_first_step_turns_the_fastest_plane_of_a_group_by_the_rate() -> None:
    """Cayley's step turns a plane by ``2 atan(rate / 2)``; slower planes by less, in proportion."""
    starts = [torch.eye(4).double()[None], torch.eye(4).double()[None]]
    plane = torch.zeros(4, 4).double()
    plane[0, 1], plane[1, 0] = 1, -1

    class Pull:
        windows, device = 4, torch.device("cpu")

        def loss(self, matrices: Sequence[Tensor], which: Sequence[int]) -> float:
            return -sum(float(m[0, 0, 1]) for m in matrices)

        def gradients(
            self, matrices: Sequence[Tensor], which: Sequence[int]
        ) -> tuple[float, list[Tensor]]:
            return 0.0, [-5 * plane[None], -1 * plane[None]]

    for groups, ratio in (([0, 0], 0.2), ([0, 1], 1.0)):
        found = learn(starts, groups, Pull(), Descent(1, 0.2, 1, 0.0, 0)).matrices
        angles = [torch.atan2(m[0, 0, 1], m[0, 0, 0]) for m in found]
        assert float(angles[0]) == pytest.approx(2 * torch.atan(torch.tensor(0.1)).item())
        assert float(angles[1]) == pytest.approx(2 * torch.atan(torch.tensor(ratio * 0.1)).item())


def test_progress_is_told() -> None:
    told: list[tuple[int, int, float, float]] = []
    network = Distance([near(stack(1, 6), 2, 0.1)], 0.0)
    found = learn([stack(1, 6)], [0], network, HOW, lambda *a: told.append(a))
    assert [(number, count) for number, count, *_ in told] == [(n + 1, 10) for n in range(10)]
    assert told[0][2] == found.first
    assert told[0][3] != told[0][3]
    assert told[-1][2] < told[0][2]
    told.clear()
    learn([stack(1, 6)], [0], network, Descent(3, 0.1, 1, 0.0, 0), lambda *a: told.append(a))
    assert [number for number, *_ in told] == [1, 2, 3]


def test_the_largest_singular_value() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        X = torch.randn(3, 20, 20, dtype=torch.float64, generator=generator)
        exact = float(torch.linalg.matrix_norm(X - X.mT, 2).max())
        assert 0.9 * exact < largest_singular(X - X.mT) <= exact * (1 + 1e-12)
    assert largest_singular(torch.zeros(2, 3, 3).double()) == 0
