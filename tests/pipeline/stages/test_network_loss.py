"""The network's loss against transformers' whole model, its gradients against differences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.architectures.spaces import Space
from pipeline.errors import ResourceError
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import quantize_free
from pipeline.quantization.scales import alternating
from pipeline.recipe_files import load_recipe
from pipeline.stages import network_loss as stage
from pipeline.stages.load import Source, open_source
from pipeline.stages.network_loss import QuantizedNetwork, quick_rounding
from pipeline.stages.transform import _spaces
from pipeline.transforms.folding import plan_fold
from pipeline.transforms.model import Model
from pipeline.transforms.operators import BlockRotation, random_orthogonal
from tests.tiny import make_checkpoint

TOKENS = torch.randint(0, 512, (5, 12), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("network")
    return {f: make_checkpoint(root / f, f, **SETTINGS[f]) for f in SETTINGS}


def model_of(folder: Path, rotate: str = "rotate:allow_untie=true") -> tuple[Source, Model]:
    options = {"model": str(folder), "transforms": (rotate,), "type": "Q4_0"}
    source = open_source(load_recipe(options=options).recipe, allow_pickle=False)
    model = Model(_spaces(source), source.exact)
    if "values" not in rotate:
        plan_fold(model, {})
    return source, model


def spaces_and_rotations(
    model: Model, kinds: Sequence[str], seed: int = 0
) -> tuple[list[Space], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    spaces = list(model.of_kinds(kinds))
    drawn = [random_orthogonal(s.unit, generator, s.width // s.unit) for s in spaces]
    return spaces, [m.reshape(-1, s.unit, s.unit) for m, s in zip(drawn, spaces, strict=True)]


def network(source: Source, model: Model, spaces: list[Space], **options: Any) -> QuantizedNetwork:
    return QuantizedNetwork(
        source, model.read, None, spaces, TOKENS, **{"batch": 2, "device": CPU, **options}
    )


def coarse(name: str, weight: Tensor) -> Tensor:
    step = weight.abs().amax(1, keepdim=True) / 4
    return (weight / step).round() * step


@pytest.mark.parametrize("kinds", [("residual", "values"), ("values",)], ids=str)
@pytest.mark.parametrize("family", SETTINGS)
def test_the_loss_is_that_of_the_whole_model(
    family: str, kinds: tuple[str, ...], folders: dict[str, Path]
) -> None:
    rotate = "rotate:allow_untie=true" if "residual" in kinds else "rotate:spaces=values"
    source, model = model_of(folders[family], rotate)
    spaces, matrices = spaces_and_rotations(model, kinds)
    found = network(source, model, spaces, rounded=coarse)
    assert found.windows == 5
    library = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = library(TOKENS).logits.double().log_softmax(-1)
    for space, stack in zip(spaces, matrices, strict=True):
        model.change(space, BlockRotation(stack))
    weights = {n: model.read(n).float() for n in source.shapes}
    weights = {n: coarse(n, w) if n in source.plan.types else w for n, w in weights.items()}
    library = AutoModelForCausalLM.from_pretrained(
        folders[family], dtype=torch.float32, tie_word_embeddings=False
    ).eval()
    library.load_state_dict({HEAD: weights[EMBEDDING], **weights})
    with torch.no_grad():
        got = library(TOKENS).logits.double().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - got)).sum(-1)
    for which in ([0, 1, 2, 3, 4], [3], [4, 0, 2]):
        expected = float(divergence[which].mean())
        assert expected > 1e-3
        assert found.loss(matrices, which) == pytest.approx(expected, rel=2e-3)
        assert found.gradients(matrices, which)[0] == pytest.approx(expected, rel=2e-3)


def shifted(name: str, weight: Tensor) -> Tensor:
    """Rounding errors that do not depend on the weights: straight through is then the truth."""
    columns = torch.arange(weight.shape[1]).to(weight)
    return weight + 0.1 * weight.new_tensor(len(name)).sin() * (columns * 1.7).cos()


@pytest.mark.parametrize("family", SETTINGS)
def test_gradients_are_differences(family: str, folders: dict[str, Path]) -> None:
    source, model = model_of(folders[family])
    spaces, matrices = spaces_and_rotations(model, ("residual", "values"))
    found = network(source, model, spaces, rounded=shifted, dtype=torch.float64)
    loss, gradients = found.gradients(matrices, [0, 3, 4])
    assert loss == pytest.approx(found.loss(matrices, [0, 3, 4]), rel=1e-12)
    assert loss > 1e-3
    generator = torch.Generator().manual_seed(2)
    for index, gradient in enumerate(gradients):
        assert gradient.dtype == torch.float64
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        ends = []
        for h in (1e-5, -1e-5):
            moved = [m + h * direction if n == index else m for n, m in enumerate(matrices)]
            ends.append(found.loss(moved, [0, 3, 4]))
        expected = float((gradient * direction).sum())
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(expected, rel=1e-5)


def test_without_rounding_no_rotation_is_better_than_another(folders: dict[str, Path]) -> None:
    """The loss is 0; and where another text is wanted, the gradient has no part that rotates."""
    source, model = model_of(folders["qwen2"])
    spaces, matrices = spaces_and_rotations(model, ("residual", "values"))
    found = network(source, model, spaces, rounded=lambda name, weight: weight, dtype=torch.float64)
    assert found.loss(matrices, range(5)) == pytest.approx(0, abs=1e-12)
    found._wanted = found._wanted.roll(1, 1)
    loss, gradients = found.gradients(matrices, [0, 1])
    assert loss > 0.1
    for A, G in zip(matrices, gradients, strict=True):
        product = G @ A.mT
        assert float((product - product.mT).norm()) < 1e-10 * float(G.norm())
    assert float(gradients[0].norm()) > 1e-3


def test_gradients_of_real_rounding_lower_the_loss(folders: dict[str, Path]) -> None:
    """Of a rounding that is smooth enough, in the direction that descent takes."""
    source, model = model_of(folders["llama"])
    spaces, matrices = spaces_and_rotations(model, ("residual",))
    found = network(source, model, spaces, rounded=shifted)
    before, (gradient,) = found.gradients(matrices, range(5))
    (A,) = matrices
    product = gradient @ A.mT
    skew = product - product.mT
    turned = torch.linalg.matrix_exp(-1e-2 * skew / skew.norm()) @ A
    assert found.loss([turned], range(5)) < before


@pytest.mark.parametrize(
    ("kind", "worst"),
    [
        ("Q2_0", 1.1),
        ("Q2_K", 1.15),
        ("Q3_K", 1.1),
        ("Q4_K", 1.25),
        ("INT2_G32", 1.1),
        ("INT3", 1.1),
        ("INT4_G32", 1.15),
        ("Q4_0", 1.15),
    ],
)
def test_quick_rounding_is_the_formats_and_nearly_the_best(kind: str, worst: float) -> None:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(6, 512, generator=generator)
    found = quick_rounding({"w": kind})("w", W)
    assert found.shape == W.shape
    fmt = get_format(kind)
    best = quantize_free(W, fmt, "piso").dequantize()
    ratio = float((found - W).square().sum() / (best - W).square().sum())
    assert 1 - 1e-6 < ratio < worst
    for rows in (found.reshape(-1, fmt.group_of(512))[:40]).unbind():
        assert len(rows.unique()) <= len(fmt.levels)
    alone = quick_rounding({"w": kind})("w", W[2:3])
    assert torch.equal(alone, found[2:3])


@pytest.mark.parametrize("kind", ["INT3_G32", "UINT3_G32", "Q2_0"])
def test_a_turn_never_raises_the_error(kind: str) -> None:
    fmt = get_format(kind)
    W = torch.randn(200, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def error(s: Tensor, m: Tensor) -> Tensor:
        return (W - alternating._values(W, s, m, fmt)[1]).square().sum(1)

    for share in alternating.STARTS:
        s, m = alternating._covering(W, fmt, share, True)
        errors = [error(s, m)]
        for _ in range(5):
            s, m = alternating._fitted(W, s, m, fmt)
            errors.append(error(s, m))
        for before, after in pairwise(errors):
            assert (after <= before * (1 + 1e-12)).all()
        assert errors[-1].sum() < errors[0].sum()


def test_a_gpu_that_is_too_small_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = model_of(folders["llama"])
    needed = stage.needed_bytes(source, 100, 4)
    assert needed > 8 * source.checkpoint.num_parameters
    assert stage.needed_bytes(source, 100, 8) > needed
    assert stage.needed_bytes(source, 200, 4) > needed
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed, 2 * needed))
    stage.check_memory(source, 100, 4, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 2 * needed))
    with pytest.raises(ResourceError, match="takes about") as caught:
        stage.check_memory(source, 100, 4, gpu)
    assert "objective=layers" in str(caught.value)
    stage.check_memory(source, 100, 4, CPU)


def test_wide_and_float_types_are_rounded_as_a_deploy_does() -> None:
    W = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(quick_rounding({"w": "F16"})("w", W), W.half().float())
    assert torch.equal(quick_rounding({"w": "F32"})("w", W), W)
    wide = quantize_free(W, get_format("Q8_0"), "absmax").dequantize()
    assert torch.equal(quick_rounding({"w": "Q8_0"})("w", W), wide)
