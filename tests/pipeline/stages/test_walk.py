"""The walk over the blocks: estimates of the mismatch share, cached inputs, devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from pipeline.calibration import streams
from pipeline.errors import ResourceError
from pipeline.quantization.layer import LayerOptions
from pipeline.recipe_files import load_recipe
from pipeline.stages import mismatch_share
from pipeline.stages.load import Source, open_source
from pipeline.stages.mismatch_share import Estimate, moment_options
from pipeline.stages.walk import SolvedSite, Walk, WalkSettings, choose_device
from tests.tiny import make_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = make_checkpoint(tmp_path_factory.mktemp("walk") / "m", "llama")
    recipe = load_recipe(options={"model": str(folder), "type": "Q4_0"}).recipe
    return open_source(recipe, allow_pickle=False)


def solve(source: Source, settings: WalkSettings, blocks: int = 2) -> list[SolvedSite]:
    """All sites of the first blocks, on random tokens and with a rounded embedding."""
    tokens = torch.randint(0, 512, (8, 24), generator=torch.Generator().manual_seed(0))
    embedding = source.read("model.embed_tokens.weight").half().float()
    with torch.inference_mode():
        walk = Walk(source, embedding, tokens, replace(settings, batch=2))
        return [site for index in range(blocks) for site in walk.solve(index)]


def codes(sites: list[SolvedSite]) -> dict[str, torch.Tensor]:
    return {n: t.content.codes for site in sites for n, t in site.stored.items()}


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor | None]:
    """Collects the shares that solvers are called with."""
    seen: list[torch.Tensor | None] = []
    original = mismatch_share.solve_with_estimate

    def watch(weights, moments, objective, solve: Callable, *rest):
        def watched(stacked, mismatch):
            seen.append(mismatch)
            return solve(stacked, mismatch=mismatch)

        return original(weights, moments, objective, watched, *rest)

    monkeypatch.setattr("pipeline.stages.walk.solve_with_estimate", watch)
    return seen


@pytest.mark.parametrize("estimate", get_args(Estimate))
def test_every_estimate_gives_one_share_a_linear(
    source: Source, estimate: Estimate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(monkeypatch)
    options = LayerOptions(mismatch=0.8)
    sites = solve(source, WalkSettings(options=options, mismatch_estimate=estimate))
    assert len(codes(sites)) == 14
    if estimate in ("fixed", "sampled"):
        assert seen == [None] * 8
        return
    shares = [s for s in seen if s is not None]
    assert len(shares) == 8
    assert len(seen) == (16 if estimate == "closed-form" else 8)
    assert all(((s >= 0) & (s <= 0.8)).all() for s in shares)
    # qkv is three linears: at most three values, each for all rows of one linear.
    assert 1 <= len(shares[0].unique_consecutive()) <= 3
    assert len({float(s[0]) for s in shares}) > 1


def test_what_an_estimate_needs_is_accumulated() -> None:
    assert moment_options("split-halves", 0.1, 8, 0).halves
    assert moment_options("reachable", 0.0, 8, 0).mismatch
    drawn = moment_options("sampled", 0.0, 8, seed=3).coefficients
    again = moment_options("sampled", 0.0, 8, seed=3).coefficients
    assert drawn is not None
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, moment_options("sampled", 0.0, 8, seed=4).coefficients)
    assert ((drawn >= 0) & (drawn <= 0.5)).all()


def test_kept_inputs_change_no_bit(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = WalkSettings(options=LayerOptions(stream_correction=1.0, refine_rounds=1))
    kept = codes(solve(source, settings))
    monkeypatch.setattr(streams, "KEPT_BYTES", 0)
    again = codes(solve(source, settings))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_held_out_windows_judge_refinement(source: Source) -> None:
    settings = WalkSettings(options=LayerOptions(refine_rounds=3), held_out=0.3)
    sites = solve(source, settings, blocks=1)
    assert all(site.record["tokens"] == 6 * 24 for site in sites)
    for site in sites:
        (kept,), (ratio,) = site.record["refine_rounds"], site.record["refined"]
        assert 0 <= kept <= 3
        assert ratio <= 1
        assert (ratio < 1) == (kept > 0)


def test_the_stream_correction_lowers_the_error_of_the_stream(source: Source) -> None:
    """After block 0 the quantized residual stream is closer to the float one."""
    tokens = torch.randint(0, 512, (8, 24), generator=torch.Generator().manual_seed(0))
    embedding = source.read("model.embed_tokens.weight")
    coarse = embedding + 0.02 * torch.randn(
        embedding.shape, generator=torch.Generator().manual_seed(1)
    )
    errors = {}
    for share in (0.0, 1.0):
        settings = WalkSettings(options=LayerOptions(stream_correction=share), batch=2)
        with torch.inference_mode():
            walk = Walk(source, coarse, tokens, settings)
            list(walk.solve(0))
        ours, theirs = walk._quantized_stream.residual, walk._float_stream.residual
        errors[share] = sum(
            float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True)
        )
    assert errors[1.0] < 0.95 * errors[0.0]


def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ResourceError, match="no GPU"):
        choose_device("cuda")


def test_a_replayed_block_moves_the_streams_like_a_solved_one(
    source: Source, tmp_path: Path
) -> None:
    settings = WalkSettings(options=LayerOptions(stream_correction=1.0), batch=2)
    tokens = torch.randint(0, 512, (4, 24), generator=torch.Generator().manual_seed(0))
    embedding = source.read("model.embed_tokens.weight")
    with torch.inference_mode():
        first, second = (Walk(source, embedding, tokens, settings) for _ in range(2))
        stored = {n: t for site in first.solve(0) for n, t in site.stored.items()}
        second.replay(0, stored)
    for a, b in (
        (first._quantized_stream, second._quantized_stream),
        (first._float_stream, second._float_stream),
    ):
        for x, y in zip(a.residual, b.residual, strict=True):
            np.testing.assert_array_equal(x.numpy(), y.numpy())
