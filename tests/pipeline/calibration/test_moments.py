"""H and G against inputs that hooks see in transformers' own forward pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.architectures.base import SITES
from pipeline.calibration.moments import Moments
from pipeline.calibration.streams import MomentOptions, Stream, site_moments
from pipeline.errors import InputError
from runtimes.torch_reference import TorchReference
from tests.tiny import FAMILIES, random_model


def perturbed(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of a model that differs a little in every linear."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: w + 0.02 * torch.randn(w.shape, generator=generator) * (w.ndim == 2)
        for name, w in model.state_dict().items()
    }


def inputs_of_block(model: PreTrainedModel, tokens: Tensor, block: int) -> dict[str, Tensor]:
    """Input of each site's first linear, [tokens, in], in one ordinary forward pass."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(f"model.layers.{block}.{site.linears[0]}").register_forward_pre_hook(
            lambda _, args, site=site: seen.__setitem__(site.name, args[0].flatten(0, 1).double())
        )
        for site in SITES
    ]
    # The residual stream where o and down add to it is what the two norms of the block read.
    for norm, site in (("input_layernorm", "o"), ("post_attention_layernorm", "down")):
        module = model.get_submodule(f"model.layers.{block}.{norm}")
        keep = partial(seen.__setitem__, f"stream {site}")
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, keep=keep: keep(args[0].flatten(0, 1).double())
            )
        )
    model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_every_site_in_the_second_block(family: str) -> None:
    model = random_model(family)
    tokens = torch.randint(0, 512, (6, 20), generator=torch.Generator().manual_seed(0))
    other = perturbed(model)
    original = {name: w.clone() for name, w in model.state_dict().items()}
    references = [
        TorchReference(model.config, weights.__getitem__) for weights in (original, other)
    ]
    streams = [Stream(list(r.embed(tokens).split(4))) for r in references]
    for reference, stream in zip(references, streams, strict=True):
        stream.pass_block(reference.block(0))
    X = inputs_of_block(model, tokens, 1)
    model.load_state_dict(other)
    Xq = inputs_of_block(model, tokens, 1)
    blocks = [r.block(1) for r in references]
    for site in SITES:
        found = site_moments(site.name, (blocks[1], streams[1]), (blocks[0], streams[0]), "block 1")
        moments = found.solving
        assert found.held_out is None
        assert found.halves is None
        assert moments.tokens == 120
        assert moments.cross is not None
        x, xq = X[site.name], Xq[site.name]
        scale = moments.hessian.abs().max().item()
        torch.testing.assert_close(moments.hessian, xq.T @ xq, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(moments.cross, xq.T @ x, rtol=1e-4, atol=1e-5 * scale)
        assert (moments.cross - moments.cross.T).abs().max() > 1e-3 * scale
        assert (moments.residual is not None) == (site.name in ("o", "down"))
        if moments.residual is not None:
            lost = X[f"stream {site.name}"] - Xq[f"stream {site.name}"]
            expected = xq.T @ lost
            atol = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(moments.residual, expected, rtol=1e-4, atol=atol)
        for block, stream in zip(blocks, streams, strict=True):
            stream.pass_site(block, site.name)
    whole = references[1].block(1)(references[1].block(0)(references[1].embed(tokens)))
    torch.testing.assert_close(torch.cat(streams[1].residual), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("share", "apart"), [(0.0, 0), (0.01, 1), (0.3, 2), (0.99, 6)])
def test_batches_that_are_held_out(share: float, apart: int) -> None:
    """Solving and held-out moments are of different tokens and add up to all of them."""
    model = random_model("llama")
    reference = TorchReference(model.config, model.state_dict().__getitem__)
    tokens = torch.randint(0, 512, (7, 20), generator=torch.Generator().manual_seed(0))
    stream = Stream(list(reference.embed(tokens).split(1)))
    block = reference.block(0)
    whole = site_moments("qkv", (block, stream), None, "block 0").solving
    options = MomentOptions(held_out=share, halves=True)
    found = site_moments("qkv", (block, stream), None, "block 0", options)
    kept, held = found.solving, found.held_out
    if found.halves is not None:
        torch.testing.assert_close(found.halves[0].hessian + found.halves[1].hessian, kept.hessian)
    assert (found.halves is None) == (apart == 6)
    assert kept.tokens == 20 * (7 - apart)
    assert (0 if held is None else held.tokens) == 20 * apart
    total = kept.hessian + (0 if held is None else held.hessian)
    torch.testing.assert_close(total, whole.hessian)


def test_one_batch_is_never_held_out() -> None:
    model = random_model("llama")
    reference = TorchReference(model.config, model.state_dict().__getitem__)
    stream = Stream([reference.embed(torch.zeros(3, 8, dtype=torch.int64))])
    found = site_moments(
        "qkv", (reference.block(0), stream), None, "b", MomentOptions(held_out=0.5)
    )
    assert found.held_out is None


def test_batches_do_not_change_the_sums() -> None:
    x = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = Moments(8, cross=False, name="m"), Moments(8, cross=False, name="m")
    whole.add(x, None, 0)
    for i, part in enumerate(x.split(2)):
        parts.add(part, None, 2 * i)
    torch.testing.assert_close(whole.hessian, parts.hessian, rtol=1e-5, atol=1e-5)
    assert whole.tokens == parts.tokens == 30


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("stream", ["quantized", "float"])
def test_a_bad_activation_names_site_stream_and_sample(stream: str, value: float) -> None:
    good, bad = torch.ones(4, 5, 8), torch.ones(4, 5, 8)
    bad[2, 3, 1] = value
    pair = (bad, good) if stream == "quantized" else (good, bad)
    moments = Moments(8, cross=True, name="block 3, site down")
    with pytest.raises(InputError, match=f"block 3, site down: the {stream} model's") as caught:
        moments.add(*pair, first_sample=40)
    assert "sample 42" in caught.value.why


def test_infinities_that_cancel_are_still_found() -> None:
    x = torch.ones(2, 3, 4)
    x[0, 0, 0], x[1, 0, 0] = float("inf"), float("-inf")
    with pytest.raises(InputError, match="NaN or Inf"):
        Moments(4, cross=False, name="m").add(x, None, 0)


def test_the_reference_streams_what_transformers_computes() -> None:
    for family in FAMILIES:
        model = random_model(family)
        weights = model.state_dict()
        tokens = torch.randint(0, 512, (3, 33), generator=torch.Generator().manual_seed(1))
        reference = TorchReference(model.config, weights.__getitem__, batch=2)
        with torch.inference_mode():
            expected = model(tokens).logits[:, 4:-1]
        got = torch.stack(list(reference.logits(tokens, 4)))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert isinstance(reference.block(0).linear("self_attn.q_proj"), nn.Linear)
