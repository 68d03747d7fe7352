"""The multiple-choice knapsack: one option a group, least total loss within a budget.

Exact, with a proof: dynamic programming over lists of undominated partial solutions (Nemhauser and
Ullmann 1969; for this problem Dyer, Riha and Walker 1995), from which every state goes that cannot
lead to less than the best solution known, judged by the linear relaxation of the groups still to
come (Sinha and Zoltners 1979: the lower convex hull of each group, taken in order of slope).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_STATES = 100_000
"""Partial solutions kept after a group: at most 0.6 MB for each group, and 30 MB at work."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Option:
    """One choice for a group.

    Attributes:
        cost: What it takes of the budget, at least 0.
        loss: What is to be small; finite, any sign.
    """

    cost: int
    loss: float


@dataclass(frozen=True)
class Solution:
    """A choice for every group.

    Attributes:
        chosen: Index of the option of each group.
        cost: Sum of their costs, at most the budget.
        loss: Sum of their losses.
        bound: No choice within the budget has a smaller loss than this.
    """

    chosen: tuple[int, ...]
    cost: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How much smaller another choice's loss might be; 0 if this one is proven best."""
        return max(0.0, self.loss - self.bound)


class InfeasibleError(ValueError):
    """Even the cheapest option of every group is beyond the budget; holds their cost."""

    def __init__(self, least: int, budget: int) -> None:
        super().__init__(f"the cheapest options cost {least}, the budget is {budget}")
        self.least = least


def solve(
    groups: Sequence[Sequence[Option]], budget: int, *, most_states: int = MOST_STATES
) -> Solution:
    """The best choice of one option a group.

    Among choices of the same loss, one of least cost is taken.

    Args:
        groups: Options of each group, at least one.
        budget: Most that the chosen options may cost together.
        most_states: Partial solutions kept after each group. Where more are needed to be exact,
            those of the worst bounds are dropped, and `Solution.gap` says what they might hide.

    Raises:
        InfeasibleError: No choice is within the budget.
        ValueError: A group without options, a negative cost, or a loss that is not finite.
    """
    _check(groups)
    useful = [undominated(options) for options in groups]
    least = sum(groups[i][kept[0]].cost for i, kept in enumerate(useful))
    if least > budget:
        raise InfeasibleError(least, budget)
    costs = [np.array([groups[i][o].cost for o in kept]) for i, kept in enumerate(useful)]
    losses = [np.array([groups[i][o].loss for o in kept]) for i, kept in enumerate(useful)]
    relaxed = _Relaxation(costs, losses)
    picked, dropped = _search(costs, losses, relaxed, budget, most_states)
    chosen = tuple(kept[pick] for kept, pick in zip(useful, picked, strict=True))
    options = [options[o] for options, o in zip(groups, chosen, strict=True)]
    loss = float(sum(option.loss for option in options))
    bound = max(min(loss, dropped), min(loss, float(relaxed.bound(0, np.array([budget]))[0])))
    return Solution(chosen, sum(option.cost for option in options), loss, bound)


def undominated(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other one beats in cost and loss, by rising cost.

    Of equal options the first is kept.
    """
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss)):
        if not kept or options[index].loss < options[kept[-1]].loss:
            kept.append(index)
    return kept


def _check(groups: Sequence[Sequence[Option]]) -> None:
    for options in groups:
        if not options:
            raise ValueError("a group has no options")
        for option in options:
            if option.cost < 0 or not np.isfinite(option.loss):
                raise ValueError(f"{option} is no option")


class _Relaxation:
    """Least loss of the last groups if options could be mixed, as a function of their budget.

    It is piecewise linear and convex; its corners are kept for every suffix of the groups.
    """

    def __init__(self, costs: Sequence[Integers], losses: Sequence[Floats]) -> None:
        self._corners: list[tuple[Floats, Floats]] = [(np.zeros(1), np.zeros(1))]
        steps = np.zeros((0, 2))
        start = np.zeros(2)
        for cost, loss in zip(reversed(costs), reversed(losses), strict=True):
            hull = _lower_hull(cost, loss)
            start = start + hull[0]
            steps = np.concatenate([steps, np.diff(hull, axis=0)])
            steps = steps[np.argsort(steps[:, 1] / steps[:, 0], kind="stable")]
            corners = np.concatenate([start[None], start + np.cumsum(steps, axis=0)])
            self._corners.append((corners[:, 0], corners[:, 1]))
        self._corners.reverse()

    def bound(self, first: int, budgets: NDArray[np.generic]) -> Floats:
        """Least loss of groups ``first ..`` within each budget; infinite where none fits."""
        cost, loss = self._corners[first]
        found = np.interp(budgets.astype(np.float64), cost, loss)
        return np.where(budgets < cost[0], np.inf, found)


def _lower_hull(cost: Integers, loss: Floats) -> Floats:
    """Corners of the lower convex hull of undominated options, [corners, 2]."""
    hull: list[tuple[float, float]] = []
    for point in zip(cost.astype(np.float64), loss, strict=True):
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return np.array(hull)


def _is_above(
    left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]
) -> bool:
    """Whether the middle point is on or above the line through the others."""
    return (middle[1] - left[1]) * (right[0] - left[0]) >= (right[1] - left[1]) * (
        middle[0] - left[0]
    )


def _search(
    costs: Sequence[Integers],
    losses: Sequence[Floats],
    relaxed: _Relaxation,
    budget: int,
    most_states: int,
) -> tuple[list[int], float]:
    """Positions of the best options, and the least bound of the states that were dropped."""
    incumbent = _greedy(costs, losses, budget)
    best = _total(losses, incumbent)
    slack = 1e-12 * sum(float(np.abs(loss).max()) for loss in losses)
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    dropped = np.inf
    for group, (own_cost, own_loss) in enumerate(zip(costs, losses, strict=True)):
        parents, options = np.divmod(np.arange(len(cost) * len(own_cost)), len(own_cost))
        cost, loss = cost[parents] + own_cost[options], loss[parents] + own_loss[options]
        kept = _pareto(cost, loss)
        bound = loss[kept] + relaxed.bound(group + 1, budget - cost[kept])
        # The incumbent itself must survive the rounding of its own bound.
        useful = bound <= best + slack
        kept, bound = kept[useful], bound[useful]
        if len(kept) > most_states:
            order = np.argsort(bound, kind="stable")
            dropped = min(dropped, float(bound[order[most_states]]))
            kept = kept[np.sort(order[:most_states])]
        history.append((parents[kept].astype(np.int32), options[kept].astype(np.int16)))
        cost, loss = cost[kept], loss[kept]
    found = _trace(history)
    return (found if found and _total(losses, found) <= best else incumbent), dropped


def _pareto(cost: Integers, loss: Floats) -> Integers:
    """Indices of the states that no other one beats in cost and loss, by rising cost."""
    order = np.lexsort((loss, cost))
    ordered = loss[order]
    before = np.concatenate([[np.inf], np.minimum.accumulate(ordered)[:-1]])
    return order[ordered < before]


def _trace(history: Sequence[tuple[NDArray[np.int32], NDArray[np.int16]]]) -> list[int]:
    """The options on the way to the last, least loss state; empty if no state was left."""
    if len(history[-1][0]) == 0:
        return []
    state, path = -1, []
    for parents, options in reversed(history):
        path.append(int(options[state]))
        state = int(parents[state])
    return path[::-1]


def _total(losses: Sequence[Floats], picked: Sequence[int]) -> float:
    return float(sum(loss[pick] for loss, pick in zip(losses, picked, strict=True)))


def _greedy(costs: Sequence[Integers], losses: Sequence[Floats], budget: int) -> list[int]:
    """A good choice: from the cheapest options, the step that gains most for its cost, in turn."""
    picked = [0] * len(costs)
    left = budget - int(sum(cost[0] for cost in costs))
    while True:
        best: tuple[float, int, int] | None = None
        for group, pick in enumerate(picked):
            extra = costs[group][pick + 1 :] - costs[group][pick]
            gain = (losses[group][pick] - losses[group][pick + 1 :]) / np.maximum(extra, 1)
            gain[extra > left] = -np.inf
            if len(gain) and gain.max() > (best[0] if best else 0.0):
                step = int(gain.argmax())
                best = (float(gain[step]), group, pick + 1 + step)
        if best is None:
            return picked
        _, group, pick = best
        left -= int(costs[group][pick] - costs[group][picked[group]])
        picked[group] = pick
