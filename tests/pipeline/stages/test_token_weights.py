"""Token weights against one backward pass of the library's whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.calibration.streams import Stream, site_moments
from pipeline.progress import open_progress
from pipeline.recipe_files import load_recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages import token_weights as stage
from pipeline.stages.load import open_source
from pipeline.stages.quantize import quantize
from pipeline.stages.token_weights import token_weights
from tests.tiny import make_checkpoint

TOKENS = torch.randint(0, 512, (6, 20), generator=torch.Generator().manual_seed(1))
SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("weights") / "m", "qwen2")


def measured(checkpoint: Path, folder: Path, exponent: float, **options: Any) -> dict[str, Tensor]:
    values = {"model": str(checkpoint), "calibration.gradient_weighting": exponent, **options}
    recipe = load_recipe(options={"calibration.batch": 2, **values}).recipe
    source = open_source(recipe, allow_pickle=False)
    with RunDirectory(folder, {"x": 1}) as run, open_progress("quiet") as progress:
        return token_weights(source, TOKENS, recipe, run, progress)


def expected(checkpoint: Path, exponent: float, seed: int = 0) -> dict[str, Tensor]:
    """The same labels, all gradients from one call of autograd."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    outputs: dict[str, list[Tensor]] = {}
    for index, layer in enumerate(model.model.layers):
        for site, linears in SITES.items():
            for linear in linears:
                seen = outputs.setdefault(f"{index}.{site}", [])
                layer.get_submodule(linear).register_forward_hook(
                    lambda module, inputs, output, seen=seen: seen.append(output)
                )
    logits = model(TOKENS).logits
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.multinomial(w.softmax(-1), 1, generator=generator) for w in logits.detach()]
    )[:, 0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    found = {}
    for key, seen in outputs.items():
        gradients = torch.autograd.grad(loss, seen, retain_graph=True)
        weights = sum(g.double().square().sum(-1) for g in gradients) ** exponent
        found[key] = (weights / weights.mean()).float()
    return found


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_weights_are_those_of_one_backward_pass(
    exponent: float, checkpoint: Path, tmp_path: Path
) -> None:
    weights = measured(checkpoint, tmp_path / "run", exponent)
    reference = expected(checkpoint, exponent)
    assert weights.keys() == reference.keys()
    for key, values in reference.items():
        torch.testing.assert_close(weights[key], values, rtol=2e-3, atol=1e-5)
    assert max(float(w.max()) for w in weights.values()) > 1.5


def test_the_text_may_be_taken_in_parts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(checkpoint, tmp_path / "whole", 1.0)
    monkeypatch.setattr(stage, "STREAM_BYTES", 1)
    apart = measured(checkpoint, tmp_path / "apart", 1.0)
    for key, values in whole.items():
        torch.testing.assert_close(apart[key], values, rtol=1e-5, atol=1e-7)


def test_they_are_kept_and_not_measured_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured(checkpoint, tmp_path / "run", 1.0)
    monkeypatch.setattr(stage, "_squared_gradients", None)
    again = measured(checkpoint, tmp_path / "run", 1.0)
    assert all(torch.equal(again[key], values) for key, values in first.items())


class Linears:
    """A block whose sites get the residual stream itself."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def site_input(self, site: str, residual: Tensor, heads: Tensor | None = None) -> Tensor:
        return self.factor * residual


def test_moments_count_each_token_by_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    X, Xq = (torch.randn(5, 7, 6, generator=generator) for _ in range(2))
    weights = torch.rand(5, 7, generator=generator)
    streams = [(Linears(2.0), Stream(list(t.split(2)))) for t in (Xq, X)]
    moments = site_moments("down", *streams, "x", weights=weights).solving
    w, x, xq = weights.double().flatten(), X.double().flatten(0, 1), Xq.double().flatten(0, 1)
    weighted = (w[:, None] * xq).T
    torch.testing.assert_close(moments.hessian, 4 * weighted @ xq, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.cross, 4 * weighted @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.residual, 2 * weighted @ (x - xq), rtol=1e-5, atol=1e-4)
    assert moments.tokens == 35


def test_a_model_is_quantized_with_them(checkpoint: Path, tmp_path: Path) -> None:
    found = []
    for exponent in (0.0, 0.5):
        options = {"model": str(checkpoint), "calibration.gradient_weighting": exponent}
        recipe = load_recipe(options=options).recipe
        source = open_source(recipe, allow_pickle=False)
        folder = tmp_path / str(exponent)
        with RunDirectory(folder, {"x": 1}) as run, open_progress("quiet") as progress:
            model = quantize(recipe, source, TOKENS, run, progress)
            found.append(model.read("model.layers.1.mlp.down_proj.weight"))
            assert run.has("token-weights") == bool(exponent)
    assert not torch.equal(*found)
