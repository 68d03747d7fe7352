"""The knapsack against every choice there is, and against a dynamic program over bytes."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.allocation.knapsack import InfeasibleError, Option, solve, undominated

Groups = list[list[Option]]


def brute_force(groups: Groups, budget: int) -> float | None:
    """Least loss over all choices, by trying them."""
    losses = [
        math.fsum(option.loss for option in choice)
        for choice in itertools.product(*groups)
        if sum(option.cost for option in choice) <= budget
    ]
    return min(losses, default=None)


def by_budget(groups: Groups, budget: int) -> float:
    """Least loss by the textbook recursion over every budget up to this one."""
    table = np.zeros(budget + 1)
    for options in groups:
        after = np.full(budget + 1, np.inf)
        for option in options:
            if option.cost <= budget:
                reached = table[: budget + 1 - option.cost] + option.loss
                after[option.cost :] = np.minimum(after[option.cost :], reached)
        table = after
    return float(table[budget])


def check(groups: Groups, budget: int, **limits: int) -> float:
    """Solve, and check that the solution is what it says; gives its loss."""
    found = solve(groups, budget, **limits)
    options = [options[i] for options, i in zip(groups, found.chosen, strict=True)]
    assert found.cost == sum(option.cost for option in options) <= budget
    assert found.loss == pytest.approx(math.fsum(o.loss for o in options), rel=1e-12, abs=1e-12)
    assert found.bound <= found.loss
    assert found.gap == max(0.0, found.loss - found.bound)
    return found.loss


option = st.builds(
    Option,
    st.integers(0, 12),
    st.integers(-20, 40).map(lambda n: n / 8),  # sums of eighths are exact
)
few_groups = st.lists(st.lists(option, min_size=1, max_size=4), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(few_groups, st.integers(0, 60))
def test_no_choice_is_better(groups: Groups, budget: int) -> None:
    best = brute_force(groups, budget)
    if best is None:
        with pytest.raises(InfeasibleError) as caught:
            solve(groups, budget)
        least = sum(min(option.cost for option in options) for options in groups)
        assert caught.value.least == least > budget
        return
    assert check(groups, budget) == best
    assert solve(groups, budget).gap == 0


@settings(max_examples=200, deadline=None)
@given(few_groups, st.integers(0, 60), st.integers(1, 3))
def test_a_limit_of_states_never_claims_too_much(groups: Groups, budget: int, limit: int) -> None:
    best = brute_force(groups, budget)
    if best is None:
        return
    found = solve(groups, budget, most_states=limit)
    check(groups, budget, most_states=limit)
    assert found.bound <= best <= found.loss


def like_a_model(seed: int, n_groups: int) -> Groups:
    """Groups whose losses fall as those of quantizers do, with outliers of both kinds."""
    rng = random.Random(seed)
    groups = []
    for _ in range(n_groups):
        size, scale = rng.choice([8, 16, 16, 24, 64]), rng.lognormvariate(0, 1.5)
        bits = (2.625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5)
        groups.append(
            [
                Option(round(b * size * 16), scale * size * 4**-b * rng.lognormvariate(0, 0.3))
                for b in bits
            ]
        )
    return groups


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_models_are_solved_to_the_optimum(seed: int, share: float) -> None:
    groups = like_a_model(seed, 60)
    low = sum(min(o.cost for o in options) for options in groups)
    high = sum(max(o.cost for o in options) for options in groups)
    budget = round(low + share * (high - low))
    assert check(groups, budget) == pytest.approx(by_budget(groups, budget), rel=1e-12)
    assert solve(groups, budget).gap == 0


def test_more_budget_never_hurts_and_all_of_it_buys_the_best_of_each() -> None:
    groups = like_a_model(7, 12)
    low = sum(min(o.cost for o in options) for options in groups)
    high = sum(max(o.cost for o in options) for options in groups)
    losses = [solve(groups, budget).loss for budget in range(low, high + 50, 37)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(math.fsum(min(o.loss for o in g) for g in groups))


def test_large_costs_without_a_common_divisor_stay_exact() -> None:
    rng = random.Random(3)
    groups = [
        [Option(rng.randrange(10**9, 10**10), rng.randrange(1000) / 16) for _ in range(4)]
        for _ in range(7)
    ]
    budget = 7 * 5 * 10**9
    assert check(groups, budget) == brute_force(groups, budget)


def test_of_equal_losses_the_cheaper_choice_is_taken() -> None:
    groups = [[Option(9, 1.0), Option(4, 1.0), Option(5, 1.0)], [Option(3, 0.5), Option(2, 0.5)]]
    assert solve(groups, 20).chosen == (1, 1)


def test_undominated_options_are_those_that_nothing_beats() -> None:
    rng = random.Random(0)
    for _ in range(200):
        options = [Option(rng.randrange(6), float(rng.randrange(6))) for _ in range(6)]
        kept = undominated(options)
        costs = [options[i].cost for i in kept]
        assert costs == sorted(set(costs))
        for index, one in enumerate(options):
            beaten = any(
                other.cost <= one.cost
                and other.loss <= one.loss
                and (other != one or position < index)
                for position, other in enumerate(options)
                if position != index
            )
            assert (index in kept) == (not beaten)


def test_a_gap_is_proven_where_the_relaxation_is_tight() -> None:
    # Linear prices: the relaxation is exact, so that even one state proves the optimum.
    groups = [[Option(c, float(-c)) for c in range(5)] for _ in range(6)]
    found = solve(groups, 13, most_states=1)
    assert Fraction(found.loss) == -13
    assert found.gap == 0


@pytest.mark.parametrize(
    "groups",
    [[[]], [[Option(-1, 0.0)]], [[Option(1, math.nan)]], [[Option(1, math.inf)]]],
)
def test_what_is_no_option_is_refused(groups: Groups) -> None:
    with pytest.raises(ValueError, match="option"):
        solve(groups, 10)
