"""Factors against the papers' formulas and their purposes, and statistics against hooks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.architectures.spaces import Role, Space
from pipeline.transforms.changes import ReadTensor
from pipeline.transforms.equalization import (
    balanced,
    range_factors,
    searched_factors,
    smooth_factors,
)
from pipeline.transforms.model import Model, columns_of, rows_of
from pipeline.transforms.statistics import InputStatistics, channel_score, shared
from tests.pipeline.transforms.models import SETTINGS, Judge

POSITIVE = st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5)


def normed(factors: Tensor) -> Tensor:
    return factors / factors.log().mean().exp()


@settings(deadline=None)
@given(POSITIVE, POSITIVE)
def test_half_way_is_cross_layer_equalization(up: list[float], down: list[float]) -> None:
    """Nagel et al.: after it both ranges are sqrt(r1 r2), up to one factor for all channels."""
    written, read = (torch.tensor(v, dtype=torch.float64) for v in (down, up))
    factors = range_factors(written, read, 0.5)
    after = (written * factors, read / factors)
    ratio = after[0] / after[1]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    torch.testing.assert_close(normed(after[0]), normed((written * read).sqrt()))


@settings(deadline=None)
@given(POSITIVE, POSITIVE, st.floats(0, 1))
def test_smoothquant_as_published(inputs: list[float], read: list[float], alpha: float) -> None:
    x, w = (torch.tensor(v, dtype=torch.float64) for v in (inputs, read))
    s = x**alpha / w ** (1 - alpha)
    torch.testing.assert_close(smooth_factors(x, w, alpha), normed(1 / s))


def test_the_ends_of_alpha() -> None:
    written, read = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([2.0, 3.0, 5.0]).double()
    for alpha, side in (
        (0.0, written * range_factors(written, read, 0.0)),
        (1.0, read / range_factors(written, read, 1.0)),
    ):
        torch.testing.assert_close(side, side[:1].expand_as(side), msg=str(alpha))


def test_silent_channels_keep_their_scale() -> None:
    factors = balanced(torch.tensor([0.0, 2.0, 8.0]), torch.tensor([5.0, 0.0, 2.0]), 0.5)
    assert factors.tolist() == [1, 1, 1]
    assert balanced(torch.zeros(2), torch.zeros(2), 0.5).tolist() == [1, 1]


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["attention_norm", "values", "inner", "final_norm"])
def test_sizes_of_channels(name: str, kind: str) -> None:
    """Against loops over the tensors of a block, for a space with shared channels too."""
    judge = Judge(name)
    model = Model(judge.spaces(), judge.read)
    space = next(s for s in model.spaces if s.kind == kind)
    prefix = "model.layers.0."
    readers = {
        "attention_norm": [f"{prefix}self_attn.{n}_proj.weight" for n in "qkv"],
        "values": [f"{prefix}self_attn.o_proj.weight"],
        "inner": [f"{prefix}mlp.down_proj.weight"],
        "final_norm": ["lm_head.weight"],
    }[kind]
    head, share = judge.config["head_dim"] or 16, 2
    for channel in (0, 1, space.width - 1):
        columns = [channel]
        if kind == "values":
            first = channel // head * head * share + channel % head
            columns = [first, first + head]
        seen = torch.cat([judge.read(n)[:, c] for n in readers for c in columns])
        assert columns_of(model, space, "max")[channel] == seen.abs().max()
        assert columns_of(model, space, "square")[channel] == pytest.approx(
            float(seen.square().mean()), rel=1e-12
        )
    writer = {
        "attention_norm": f"{prefix}input_layernorm.weight",
        "values": f"{prefix}self_attn.v_proj.weight",
        "inner": f"{prefix}mlp.up_proj.weight",
        "final_norm": "model.norm.weight",
    }[kind]
    written = judge.read(writer)
    assert torch.equal(
        rows_of(model, space), written.abs() if written.ndim == 1 else written.abs().amax(1)
    )


def test_statistics_are_sums_over_all_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4, 7, 6, dtype=torch.float64, generator=generator)
    found = InputStatistics.empty(6, hessian=True)
    found.add(X[:1])
    found.add(X[1:])
    flat = X.reshape(-1, 6)
    assert found.tokens == 28
    assert found.hessian is not None
    torch.testing.assert_close(found.absolute, flat.abs().sum(0))
    torch.testing.assert_close(found.hessian, flat.T @ flat)
    torch.testing.assert_close(found.square, found.hessian.diagonal())
    torch.testing.assert_close(found.largest, flat.abs().max(0).values)


def test_shared_channels_are_averaged_and_spread() -> None:
    """Two key/value heads of two channels, each for two query heads."""
    space = Space("values", 0, 4, frozenset({"scale"}), {}, unit=2, share=2)
    found = InputStatistics.empty(8, hessian=False)
    found.add(torch.tensor([[1.0, 2.0, 3.0, 6.0, 10.0, 20.0, 30.0, -60.0]]))
    assert channel_score(found, space, "mean").tolist() == [2, 4, 20, 40]
    assert channel_score(found, space, "max").tolist() == [3, 6, 30, 60]
    spread = shared(space, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert spread.tolist() == [1, 2, 1, 2, 3, 4, 3, 4]
    heads = Space("heads", 0, 4, frozenset({"order"}), {}, unit=2, share=2, head_dim=2)
    assert channel_score(found, heads, "mean").tolist() == [3, 9, 30, 90]
    assert channel_score(found, heads, "max").tolist() == [2, 6, 20, 60]


class RoundingJudge:
    """Rounds a matrix to steps of its range, and checks that it is the old one in new coordinates.

    Args:
        read: Gives the matrices in the old coordinates.
        hessian: Of the inputs in the old coordinates.
    """

    def __init__(self, read: ReadTensor, hessian: Tensor) -> None:
        self._read, self._hessian = read, hessian
        self.seen: list[float] = []

    def __call__(self, name: str, weight: Tensor, hessian: Tensor) -> float:
        W = self._read(name)
        torch.testing.assert_close(
            weight @ hessian @ weight.T, W @ self._hessian @ W.T, rtol=1e-9, atol=1e-6
        )
        step = weight.abs().max() / 7
        error = (weight / step).round() * step - weight
        self.seen.append(float(((error @ hessian) * error).sum()))
        return self.seen[-1]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["attention_norm", "values", "inner"])
def test_the_search_is_judged_by_what_it_will_get(name: str, kind: str) -> None:
    """The judge sees the very matrix and Hessian of the new coordinates, the best of all is taken,
    and nothing is changed where nothing is better."""
    judge = Judge(name)
    space = next(s for s in judge.spaces() if s.kind == kind)
    readers = space.with_role(Role.READS, Role.READS_SHARED)
    width = judge.read(readers[0]).shape[1]
    X = torch.randn(50, width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    X[:, ::5] *= 30
    found = InputStatistics.empty(width, hessian=True)
    found.add(X)
    assert found.hessian is not None
    rounding = RoundingJudge(judge.read, found.hessian)
    model = Model(judge.spaces(), judge.read, judge=rounding)
    factors = searched_factors(model, space, found, 10)
    losses = torch.tensor(rounding.seen, dtype=torch.float64).reshape(11, len(readers)).sum(1)
    spread = shared(space, factors)
    H = found.hessian * spread * spread[:, None]
    taken = sum(rounding(n, judge.read(n) / spread, H) for n in readers)
    assert taken == pytest.approx(float(losses.min()), rel=1e-9)
    assert torch.equal(factors, torch.ones_like(factors)) == (int(losses.argmin()) == 0)
    flat = Model(judge.spaces(), judge.read, judge=lambda *_: 1.0)
    assert torch.equal(searched_factors(flat, space, found, 3), torch.ones_like(factors))


def test_a_search_needs_the_hessian() -> None:
    judge = Judge("llama")
    space = next(s for s in judge.spaces() if s.kind == "inner")
    found = InputStatistics.empty(space.width, hessian=False)
    found.add(torch.ones(1, space.width))
    model = Model(judge.spaces(), judge.read)
    with pytest.raises(ValueError, match="without its Hessian"):
        searched_factors(model, space, found, 2)
    with pytest.raises(ValueError, match="no calibration inputs"):
        model.measured()
    with pytest.raises(ValueError, match="no quantizer"):
        model.judge("x", torch.ones(1), torch.ones(1))
