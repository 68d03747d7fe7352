"""Integers under super-scales: enumeration of all pairs, local optimality, twins, whole layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from pipeline.kernels import fit_sub_scales
from pipeline.kernels.twin import sub_scales as twin
from pipeline.quantization.formats import QuantizedTensor, get_format
from pipeline.quantization.layer import LayerOptions, quantize_layer
from pipeline.quantization.scales import absmax, piso
from pipeline.quantization.scales.base import BlockProblem
from pipeline.quantization.scales.hierarchical import integer_ranges
from tests.pipeline.quantization.problems import correlated, energy, weights
from tests.pipeline.quantization.test_sequential import layer

NAMES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]


def groups(name: str, seed: int = 0, rows: int = 14):
    """One group of some rows under random super-scales of both signs; some rows are degenerate."""
    rng, fmt = np.random.default_rng(seed), get_format(name)
    size = fmt.group_size
    X = correlated(rng, size)
    M = X.T @ X
    w = np.stack([weights(rng, size, r % 6) for r in range(rows)])
    limits = integer_ranges(fmt)
    spread = max(abs(end) for end in limits[0]) * max(abs(v) for v in fmt.levels)
    d = 4 * rng.uniform(0.5, 1.5, rows) * rng.choice([-1, 1], rows) / spread
    dmin = rng.uniform(0.5, 1.5, rows) * rng.choice([-1, 1], rows) / max(1, limits[1][1])
    dmin *= fmt.affine
    d[-1], dmin[-2] = 0, 0
    sc, mn = (rng.integers(low, high + 1, rows) for low, high in limits)
    indices = rng.integers(0, len(fmt.levels), (rows, size))
    linear = (w + 0.1 * rng.standard_normal(w.shape)) @ M
    return fmt, w, M, linear, (d, dmin), (sc, mn, indices)


def fit(problem, *, given: bool = True, reach: int = 2, sweeps: int = 4):
    fmt, w, M, linear, supers, (sc, mn, indices) = problem
    tensors = [torch.tensor(a) for a in (w, M, linear)]
    start = (torch.tensor(sc), torch.tensor(mn), torch.tensor(indices) if given else None)
    pair = tuple(torch.tensor(a) for a in supers)
    ranges = integer_ranges(fmt)
    return fit_sub_scales(*tensors, pair, start, fmt.grid, ranges, reach=reach, sweeps=sweeps)


def value(fmt, d: float, dmin: float, sc: int, mn: int, codes: np.ndarray) -> np.ndarray:
    return d * sc * np.array(fmt.levels)[codes] - dmin * mn


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_no_pair_and_no_code_improves_the_result(name: str, given: bool) -> None:
    """Every pair of integers for the codes found, and every single code, is enumerated."""
    problem = groups(name)
    fmt, _, M, linear, (d, dmin), start = problem
    found = fit(problem, given=given, sweeps=200)
    (low, high), (bottom, top) = integer_ranges(fmt)
    for r in range(len(d)):
        codes = found.level_indices[r].numpy()
        sc, mn = int(found.scales[r]), int(found.offsets[r])
        assert low <= sc <= high
        assert bottom <= mn <= top
        reached = energy(value(fmt, d[r], dmin[r], sc, mn, codes), M, linear[r])
        assert found.objective[r].item() == pytest.approx(reached, rel=1e-9, abs=1e-9)
        least = reached - 1e-8 * abs(reached) - 1e-9
        if given:
            before = value(fmt, d[r], dmin[r], start[0][r], start[1][r], start[2][r])
            assert reached <= energy(before, M, linear[r]) + 1e-9
        for pair in itertools.product(range(low, high + 1), range(bottom, top + 1)):
            assert energy(value(fmt, d[r], dmin[r], *pair, codes), M, linear[r]) >= least
        for i, level in itertools.product(range(fmt.group_size), range(len(fmt.levels))):
            other = codes.copy()
            other[i] = level
            assert energy(value(fmt, d[r], dmin[r], sc, mn, other), M, linear[r]) >= least


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K"])
def test_a_wide_reach_is_the_best_of_all_pairs_under_rounding(name: str) -> None:
    """Without alternation the result is the minimum over the whole table of pairs."""
    problem = groups(name, seed=3)
    fmt, w, M, linear, (d, dmin), _ = problem
    found = fit(problem, given=False, reach=70, sweeps=0)
    (low, high), (bottom, top) = integer_ranges(fmt)
    levels = np.array(fmt.levels)
    for r in range(len(d) - 1):
        best = np.inf
        for sc, mn in itertools.product(range(low, high + 1), range(bottom, top + 1)):
            scale, offset = d[r] * sc, -dmin[r] * mn
            ratio = (w[r] - offset) / scale if scale else 0 * w[r]
            codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, ratio, side="right")
            best = min(best, energy(scale * levels[codes] + offset, M, linear[r]))
        assert found.objective[r].item() == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_loop_and_its_twin_agree(name: str) -> None:
    fmt, w, M, linear, supers, start = problem = groups(name, seed=1, rows=40)
    untied = [r for r in range(40) if r % 6 not in (1, 2, 3)]
    arrays = [torch.tensor(a) for a in (w, M, linear, *supers, *start)]
    for given in (True, False):
        got = fit(problem, given=given)
        expected = twin.fit_sub_scales(*arrays, given, fmt.grid, *integer_ranges(fmt), 2, 4)
        for mine, other in zip(got[:3], expected[:3], strict=True):
            assert torch.equal(mine[untied], other[untied])
        torch.testing.assert_close(got.objective, expected[3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_rule_fields_lie_on_the_lattice_and_beat_the_range(name: str) -> None:
    rng, fmt = np.random.default_rng(5), get_format(name)
    X = correlated(rng, 256)
    M = torch.tensor(X.T @ X)
    w = torch.tensor(np.stack([weights(rng, 256, r % 6) for r in range(18)]))
    problem = BlockProblem(w, M, w @ M)
    losses = {}
    for rule in (absmax, piso):
        scales = rule(problem, fmt)
        codes = scales.level_indices
        if codes is None:
            values = scales.scale.repeat_interleave(fmt.group_size, 1)
            offset = scales.offset.repeat_interleave(fmt.group_size, 1)
            ratio = torch.where(
                values == 0, 0.0, (w - offset) / torch.where(values == 0, 1, values)
            )
            codes = (ratio[:, :, None] - fmt.grid).abs().argmin(2)
        stored = QuantizedTensor(fmt, (codes + fmt.code_min).to(torch.int8), scales.fields)
        for field, limits in (("sc", fmt.sub_scale), ("mn", fmt.sub_offset)):
            if limits is not None:
                assert scales.fields[field].dtype == torch.int8
                assert limits[0] <= int(scales.fields[field].min())
                assert int(scales.fields[field].max()) <= limits[1]
        for field in ("d", "dmin")[: 1 + fmt.affine]:
            assert torch.equal(scales.fields[field].half().float(), scales.fields[field])
        error = stored.dequantize().double() - w
        losses[rule] = ((error @ M) * error).sum(1)
    assert losses[piso].sum() < losses[absmax].sum()


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_chain_lowers_the_loss_step_by_step(name: str) -> None:
    W, objective = layer(6, rows=32, width=512, tokens=1500)
    fmt = get_format(name)

    def loss(**options) -> float:
        found = quantize_layer(W, objective, fmt, LayerOptions(mismatch=0, **options))
        fields = found.quantized.scales
        assert fields["d"].shape == (32, 2)
        assert fields["sc"].shape == (32, 512 // fmt.group_size)
        return found.relative_loss

    nearest = loss(rounding="nearest")
    absolute, chosen, refined = loss(scales="absmax"), loss(), loss(refine_rounds=3)
    assert refined < chosen < nearest
    # At 6 bits the range is as good as any scale, before refinement.
    assert chosen < absolute or name == "Q6_K"
    assert refined < 0.95 * absolute


def test_published_metric_and_other_solvers_take_these_formats() -> None:
    W, objective = layer(7, rows=8, width=256, tokens=900)
    for options in (
        LayerOptions(metric="block"),
        LayerOptions(rounding="groupwise", passes=2),
        LayerOptions(rounding="gpfq"),
        LayerOptions(rounding="qronos"),
        LayerOptions(interleave="layer"),
        LayerOptions(scales="lookahead"),
        LayerOptions(scales="mse"),
        LayerOptions(scales="proxy"),
    ):
        found = quantize_layer(W, objective, get_format("Q2_K"), options)
        assert 0 < found.relative_loss < 0.2


@pytest.mark.parametrize(
    ("name", "share"),
    [("Q2_K", 1.03), ("Q3_K", 0.85), ("Q4_K", 1.03), ("Q6_K", 1.03), ("IQ4_XS", 1)],
)
def test_positive_scales_when_asked_for_and_what_negative_ones_gain(
    name: str, share: float
) -> None:
    """Levels far from symmetric gain; offsets, or many levels, take over what a sign does."""
    losses = {False: 0.0, True: 0.0}
    for seed in (7, 8):
        W, objective = layer(seed, rows=24, width=512, tokens=900)
        found = {}
        for signed in (False, True):
            options = LayerOptions(signed=signed, refine_rounds=3)
            found[signed] = quantize_layer(W, objective, get_format(name), options)
            losses[signed] += found[signed].relative_loss
        for field, values in found[False].quantized.scales.items():
            assert (values >= 0).all(), field
        assert found[False].quantized.format == get_format(name)
        assert any((values < 0).any() for values in found[True].quantized.scales.values())
    assert losses[True] < share * losses[False]
