"""Estimated divergences against transformers' own gradients and against exact divergences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.calibration.text import load_text
from pipeline.progress import open_progress
from pipeline.recipe_files import load_recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.candidates import CandidateStore, choices
from pipeline.stages.gradients import inputs_and_gradients, sampled_gradient
from pipeline.stages.load import Source, open_source
from pipeline.stages.sensitivity import (
    TABLE_WINDOWS,
    Losses,
    Sensitivity,
    WindowSplit,
)
from pipeline.stages.swaps import PlanJudge
from runtimes.torch_reference import TorchReference
from tests.tiny import trained_checkpoint

EMBEDDING = "model.embed_tokens.weight"
LINEARS = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
RECIPE = load_recipe(
    options={
        "model": str(trained_checkpoint("llama")),
        "target_bpw": 5.0,
        "calibration.batch": 2,
        "device": "cpu",
    }
).recipe


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(RECIPE, allow_pickle=False)


@pytest.fixture(scope="module")
def tokens(source: Source) -> Tensor:
    text = load_text("stdlib", "calibration").text[:60_000]
    ids = torch.tensor(source.tokenizer(text).input_ids[: 24 * 64])
    return ids.view(24, 64)


@pytest.fixture
def library() -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(trained_checkpoint("llama"), dtype=torch.float32)
    return model.eval()


def divergence(model: PreTrainedModel, before: Tensor, tokens: Tensor) -> float:
    """Mean KL in nats a token from log-probabilities, by torch's own loss."""
    with torch.no_grad():
        after = model(tokens).logits.double().log_softmax(-1)
    return float(nn.functional.kl_div(after, before, log_target=True, reduction="sum")) / (
        before.shape[0] * before.shape[1]
    )


def log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits.double().log_softmax(-1)


def through_the_blocks(
    source: Source, tokens: Tensor, seed: int, last_only: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and gradients of every linear, by our block-wise pass."""
    model = TorchReference(source.config, source.read, head=source.head)
    with torch.no_grad():
        states = [model.embed(tokens)]
        for index in range(model.n_blocks):
            states.append(model.block(index)(states[-1]))
    generator = torch.Generator().manual_seed(seed)
    gradient = sampled_gradient(model, source.read(source.head), states[-1], generator)
    found = {}
    for index in reversed(range(model.n_blocks)):
        gradient, pairs = inputs_and_gradients(model.block(index), LINEARS, states[index], gradient)
        found |= {f"model.layers.{index}.{name}.weight": pair for name, pair in pairs.items()}
        if last_only:
            break
    return found


def test_gradients_are_those_of_the_whole_model(
    source: Source, tokens: Tensor, library: PreTrainedModel
) -> None:
    found = through_the_blocks(source, tokens[:3], seed=5)
    generator = torch.Generator().manual_seed(5)
    logits = library(tokens[:3]).logits
    labels = [torch.multinomial(row.detach().softmax(-1), 1, generator=generator) for row in logits]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.cat(labels)[:, 0], reduction="sum"
    )
    loss.backward()
    weights = dict(library.named_parameters())
    assert len(found) == 2 * len(LINEARS)
    for name, (x, g) in found.items():
        expected = weights[name].grad
        assert expected is not None
        assert torch.allclose(g.T @ x, expected, atol=1e-4 * float(expected.abs().max()))


def test_the_estimate_is_unbiased_where_tokens_are_independent(
    source: Source, tokens: Tensor, library: PreTrainedModel
) -> None:
    """Outputs of the last block's MLP touch one prediction each: nothing is neglected there."""
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(library.named_parameters())[name]
    change = 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    before = log_probabilities(library, tokens[:8])
    with torch.no_grad():
        weight += change
    exact = divergence(library, before, tokens[:8])
    estimates = []
    for seed in range(40):
        x, g = through_the_blocks(source, tokens[:8], seed, last_only=True)[name]
        estimates.append(float(((x @ change.T) * g).sum(-1).double().square().mean()) / 2)
    found = torch.tensor(estimates)
    error = float(found.std()) / len(found) ** 0.5
    assert error < 0.02 * exact
    assert abs(float(found.mean()) - exact) < 4 * error


@pytest.fixture(scope="module")
def measured(
    source: Source, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Losses, RunDirectory]:
    folder = tmp_path_factory.mktemp("sensitivity") / "run"
    return measure(source, tokens, folder)


def measure(source: Source, tokens: Tensor, folder: Path) -> tuple[Losses, RunDirectory]:
    run = RunDirectory(folder, {})
    with run, open_progress("quiet") as progress:
        types, split = choices(source, RECIPE), WindowSplit.of(tokens)
        return Sensitivity(source, types, split, RECIPE, run, progress).measure(), run


def exact_losses(
    measured: tuple[Losses, RunDirectory], source: Source, tokens: Tensor, model: PreTrainedModel
) -> list[tuple[str, float, float]]:
    """Name, estimated and exact divergence of every matrix in every candidate type, alone."""
    losses, run = measured
    scored = WindowSplit.of(tokens).scored
    before, store = log_probabilities(model, scored), CandidateStore(run)
    weights = dict(model.named_parameters())
    found = []
    for name, kinds in sorted(losses.items(), key=lambda item: item[0] == EMBEDDING):
        weight = weights[name]
        if name == EMBEDDING:
            scored = scored[:TABLE_WINDOWS]
            before = log_probabilities(model, scored)
        kept = weight.detach().clone()
        for kind, estimate in kinds.items():
            with torch.no_grad():
                weight.copy_(kept + store.change(name, kind, kept))
            found.append((name, estimate, divergence(model, before, scored)))
        with torch.no_grad():
            weight.copy_(kept)
    return found


def test_estimates_order_matrices_and_types_as_exact_divergences_do(
    measured: tuple[Losses, RunDirectory], source: Source, tokens: Tensor, library: PreTrainedModel
) -> None:
    found = exact_losses(measured, source, tokens, library)
    assert len(found) == 7 * 2 * 5 + 2 * 2 + 5  # v.o.gate.. in 5 types, down in 7; the table in 5
    tables = [(e, x) for name, e, x in found if name == EMBEDDING]
    assert all(e == pytest.approx(x, rel=1e-3) for e, x in tables)
    estimates = torch.tensor([e for name, e, _ in found if name != EMBEDDING]).log()
    exact = torch.tensor([x for name, _, x in found if name != EMBEDDING]).log()
    ranks = torch.stack([estimates.argsort().argsort(), exact.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.98


def test_more_bits_lose_less(measured: tuple[Losses, RunDirectory]) -> None:
    for kinds in measured[0].values():
        assert kinds["Q8_0"] == min(kinds.values())
        assert kinds["Q8_0"] < kinds.get("Q4_0", kinds.get("Q4_K", 0.0)) / 20


def test_a_measurement_that_died_continues_to_the_same_figures(
    measured: tuple[Losses, RunDirectory],
    source: Source,
    tokens: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = RunDirectory.store
    for stop in range(1, 7):  # two blocks of candidates, tables and their losses, two blocks
        calls: list[str] = []

        def dying(self: RunDirectory, name: str, *rest: object, calls=calls, stop=stop) -> None:
            if len(calls) == stop:
                raise OSError("power cut")
            calls.append(name)
            store(self, name, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "store", dying)
            if stop < 6:
                with pytest.raises(OSError, match="power cut"):
                    measure(source, tokens, tmp_path / str(stop))
        assert measure(source, tokens, tmp_path / str(stop))[0] == measured[0]


def test_damaged_candidates_are_solved_again(
    measured: tuple[Losses, RunDirectory], source: Source, tokens: Tensor, tmp_path: Path
) -> None:
    first, run = measure(source, tokens, tmp_path / "run")
    for pattern in ("candidates-tables*", "candidates-block-0001*", "sensitivity-0000*"):
        (path,) = (run.path / "parts").glob(pattern)
        path.write_bytes(path.read_bytes()[:-1])
    again, run = measure(source, tokens, tmp_path / "run")
    assert again == first == measured[0]
    assert run.dropped == 3


def test_windows_are_shared_out_once() -> None:
    for count in (3, 4, 7, 16, 128, 360):
        windows = torch.arange(2 * count).view(count, 2)
        split = WindowSplit.of(windows)
        parts = (split.moments, split.scored, split.judged)
        seen = [tuple(row.tolist()) for part in parts for row in part]
        assert all(len(part) for part in parts)
        assert len(seen) == len(set(seen))
        assert split.disjoint
    for count in (1, 2):
        windows = torch.arange(2 * count).view(count, 2)
        assert WindowSplit.of(windows).judged is windows
        assert not WindowSplit.of(windows).disjoint


@torch.no_grad()
def test_the_judge_sees_the_whole_model_whatever_it_has_seen_before(
    measured: tuple[Losses, RunDirectory], source: Source, tokens: Tensor, library: PreTrainedModel
) -> None:
    losses, run = measured
    store, judged = CandidateStore(run), tokens[:2]
    judge = PlanJudge(source, store, judged, batch=1, device=torch.device("cpu"))
    before = log_probabilities(library, judged)
    weights = {n: w for n, w in library.named_parameters() if n in losses}
    floats = {n: w.clone() for n, w in weights.items()}
    generator = torch.Generator().manual_seed(0)
    types = {name: next(iter(kinds)) for name, kinds in losses.items()}
    for step in range(8):
        moved = list(types)[int(torch.randint(len(types), (1,), generator=generator))]
        moved = EMBEDDING if step == 4 else moved
        kinds = list(losses[moved])
        types |= {moved: kinds[int(torch.randint(len(kinds), (1,), generator=generator))]}
        for name, kind in types.items():
            weights[name].copy_(floats[name] + store.change(name, kind, floats[name]))
        found, states = judge.judge(types)
        assert found == pytest.approx(divergence(library, before, judged), rel=1e-3)
        if step % 2 == 0:
            judge.accept(types, states)
