"""Budgets: candidates, sizes of files, exchanges, and whole deploys under a budget."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.gguf import row_bytes
from pipeline import run
from pipeline.errors import InputError, PipelineError, UsageError, VerificationError
from pipeline.progress import open_progress
from pipeline.recipe_files import load_recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.allocate import (
    Allocation,
    allocate,
    check_size,
    delivered_types,
    disk_bytes,
)
from pipeline.stages.candidates import NARROW, WIDE, candidate_types, choices
from pipeline.stages.export import FileSizes, file_sizes
from pipeline.stages.load import Source, open_source
from pipeline.stages.quantize import check_types
from pipeline.stages.swaps import TRIES, improve, swaps
from tests.deploying import SMALL, deploy, digest_of_model
from tests.tiny import make_checkpoint, trained_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUICK = {"evaluation.chunks": 2, "runtime.llamacpp": "off", "gates.deployed_lnppl": 1.0}
BUDGET = {**QUICK, "token_embedding_type": None, "target_size": 260_000}


def opened(folder: Path, **options: Any) -> tuple[Source, Any]:
    recipe = load_recipe(options={"model": str(folder), **options}).recipe
    return open_source(recipe, allow_pickle=False), recipe


def test_candidates_fit_their_width() -> None:
    assert candidate_types(256) == candidate_types(1536) == WIDE
    assert candidate_types(64) == NARROW
    assert candidate_types(96) == tuple(kind for kind in NARROW if kind != "Q2_0")
    assert candidate_types(100) == ()
    for width, kinds in ((512, WIDE), (64, tuple(k for k in NARROW if k != "IQ4_NL"))):
        sizes = [row_bytes(kind, width) for kind in kinds]
        assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("tied", [True, False])
def test_what_the_recipe_names_has_one_candidate(tmp_path: Path, tied: bool) -> None:
    folder = make_checkpoint(tmp_path / "m", tie_word_embeddings=tied)
    rules = ("blk.0.ffn_down=Q8_0", "ffn_down=F16")
    source, recipe = opened(folder, target_bpw=5.0, tensor_types=rules)
    found = choices(source, recipe)
    assert found["model.layers.0.mlp.down_proj.weight"] == ("Q8_0",)
    assert found["model.layers.1.mlp.down_proj.weight"] == ("F16",)
    assert found["model.layers.1.mlp.up_proj.weight"] == candidate_types(64)
    assert found.keys() == source.plan.types.keys()
    assert (HEAD in found) is not tied
    for key in ("token_embedding_type", "output_tensor_type"):
        found = choices(*opened(folder, target_bpw=5.0, **{key: "Q8_0"}))
        fixed = {name for name in (EMBEDDING, HEAD) if found.get(name) == ("Q8_0",)}
        own = EMBEDDING if key == "token_embedding_type" or tied else HEAD
        assert fixed == {own}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_sizes_are_those_of_the_files_that_deploy_writes(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", family)
    for kind, tables in (("Q4_0", "Q8_0"), ("Q2_0", "F16")):
        options = {"type": kind, "pure": True, "token_embedding_type": tables}
        source, recipe = opened(folder, **options)
        with open_progress("quiet") as progress:
            found = {**SMALL, **QUICK, **options, "model": str(folder), "preset": None}
            found.pop("preset")
            resolved = load_recipe("fast", options=found | {"gates.deployed_kld": 1e9})
            report = run.deploy(resolved, output=tmp_path / kind, progress=progress)
        sizes = file_sizes(source, recipe)
        assert report.size_bytes == sizes.total(source.plan.types)
        (file,) = (tmp_path / kind).glob("*.gguf")
        assert file.stat().st_size == report.size_bytes


class Rugged:
    """A judge of plans whose matrices do know of each other: a fixed random number each."""

    def __init__(self, losses: dict[str, dict[str, float]]) -> None:
        self.losses, self.seen, self.found, self.present = losses, [], [], {}

    def judge(self, types: dict[str, str]) -> tuple[float, list[torch.Tensor]]:
        self.seen.append(dict(types))
        noise = random.Random(str(sorted(types.items()))).uniform(0.9, 1.1)
        loss = noise * sum(self.losses[name][kind] for name, kind in types.items())
        self.found.append(loss)
        return loss, []

    def accept(self, types: dict[str, str], states: list[torch.Tensor]) -> None:
        self.present = dict(types)


def rugged(seed: int) -> tuple[dict[str, str], dict[str, dict[str, float]], FileSizes]:
    rng = random.Random(seed)
    shapes = {f"m{i}": (rng.choice([64, 128, 256]), 256) for i in range(8)}
    losses = {
        name: {k: rng.uniform(0.5, 2) * 4.0 ** (-row_bytes(k, 256) / 32) for k in WIDE}
        for name in shapes
    }
    return {name: rng.choice(WIDE[1:5]) for name in shapes}, losses, FileSizes(1000, shapes)


@pytest.mark.parametrize("seed", range(8))
def test_exchanges_never_lose_and_never_outgrow_the_budget(seed: int) -> None:
    types, losses, sizes = rugged(seed)
    budget = sizes.total(types) + 2048
    judge = Rugged(losses)
    with open_progress("quiet") as progress:
        found = improve(types, losses, sizes, budget, judge, progress)  # type: ignore[arg-type]
    assert found.tried <= TRIES
    steps = [found.before, *(kld for _, kld in found.kept)]
    assert all(later < earlier for earlier, later in itertools.pairwise(steps))
    assert found.after == steps[-1] <= found.before
    assert judge.present == found.types
    assert all(sizes.total(plan) <= budget for plan in judge.seen)
    assert min(judge.found) == found.after
    assert len({str(plan) for plan in judge.seen}) == found.tried + 1
    replayed = dict(types)
    for swap, _ in found.kept:
        replayed |= dict(swap.moves)
    assert replayed == found.types


def test_exchanges_are_sorted_by_what_they_promise() -> None:
    types, losses, sizes = rugged(3)
    found = swaps(types, losses, sizes, sizes.total(types))
    assert found
    assert [s.expected for s in found] == sorted(s.expected for s in found)
    for swap in found:
        after = types | dict(swap.moves)
        assert sizes.total(after) <= sizes.total(types)
        change = sum(losses[n][after[n]] - losses[n][types[n]] for n in types)
        assert swap.expected == pytest.approx(change, abs=1e-12)
        assert len(swap.moves) == 2
    assert any(len(s.moves) == 1 for s in swaps(types, losses, sizes, 10**9))


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("budget") / "out"
    assert deploy(trained_checkpoint("llama"), output, BUDGET).exit_code == 0
    return output


def test_a_budget_is_kept_and_told(delivered: Path) -> None:
    manifest = json.loads((delivered / "manifest.json").read_text())
    size = (delivered / manifest["model_file"]).stat().st_size
    found = manifest["allocation"]
    assert manifest["model_file"].endswith("-260KB.gguf")
    assert size == found["size"] == manifest["report"]["size_bytes"] <= found["budget"] == 260_000
    assert size > 250_000
    assert found["gap"] <= 1e-9 * found["estimate"]
    assert found["after"] <= found["before"]
    assert found["tried"] > 0
    stored = {n: t["type"] for n, t in manifest["tensors"].items() if t["type"] != "F32"}
    assert stored == found["types"]
    assert set(found["losses"]) == set(stored)
    assert len(set(stored.values())) > 1
    notes = manifest["report"]["notes"]
    assert any("260,000 bytes" in note and f"{size:,} used" in note for note in notes)
    assert "types chosen for 260KB" in (delivered / "README.md").read_text()


def test_a_head_of_its_own_is_chosen_for_and_judged_too(tmp_path: Path) -> None:
    """Untied by a rotation: the embedding and the head are candidates apart."""
    options = {**BUDGET, "target_size": 420_000, "transforms": ("rotate:allow_untie=true",)}
    assert deploy(trained_checkpoint("llama"), tmp_path / "out", options).exit_code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {"output.weight", "token_embd.weight"} <= manifest["allocation"]["types"].keys()
    assert manifest["allocation"]["tried"] > 0


def test_a_folder_made_under_a_budget_verifies(delivered: Path) -> None:
    manifest = json.loads((delivered / "manifest.json").read_text())
    with open_progress("quiet") as progress:
        report = run.verify(delivered, progress=progress)
    assert report.exit_code == 0
    assert [g.figure for g in report.gates] == [g["figure"] for g in manifest["report"]["gates"]]


@pytest.mark.parametrize(
    "stored", [7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 9))]
)
def test_a_run_that_died_continues_to_the_same_bytes(
    stored: int, delivered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = RunDirectory.store, []

    def dying(self: RunDirectory, *args: Any) -> None:
        store(self, *args)
        calls.append(args[0])
        if len(calls) == stored:
            raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "store", dying)
        with pytest.raises(OSError, match="power cut"):
            deploy(trained_checkpoint("llama"), tmp_path / "out", BUDGET)
    deploy(trained_checkpoint("llama"), tmp_path / "out", BUDGET)
    assert digest_of_model(tmp_path / "out") == digest_of_model(delivered)


def planned(output: Path, options: dict[str, Any]) -> dict[str, tuple[str, int]]:
    values = {**SMALL, "model": str(trained_checkpoint("llama")), **options}
    with open_progress("quiet") as progress:
        return run.plan(load_recipe(options=values), output=output, progress=progress)


def test_deploy_continues_from_a_dry_run(
    delivered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planned(tmp_path / "out", BUDGET)
    parts = sum(path.stat().st_size for path in (tmp_path / "out.piso-run" / "parts").iterdir())
    source, recipe = opened(trained_checkpoint("llama"), **{**SMALL, **BUDGET})
    assert 0.3 * disk_bytes(source, recipe) < parts < disk_bytes(source, recipe)
    manifest = json.loads((delivered / "manifest.json").read_text())
    assert {n: kind for n, (kind, _) in found.items()} == {
        n: t["type"] for n, t in manifest["tensors"].items()
    }
    assert not (tmp_path / "out").exists()
    store, calls = RunDirectory.store, []

    def watched(self: RunDirectory, *args: Any) -> None:
        calls.append(args[0])
        store(self, *args)

    monkeypatch.setattr(RunDirectory, "store", watched)
    deploy(trained_checkpoint("llama"), tmp_path / "out", BUDGET)
    assert calls == ["tables", "block-0000", "block-0001"]
    assert digest_of_model(tmp_path / "out") == digest_of_model(delivered)


def bought(tmp_path: Path, **options: Any) -> Allocation:
    """What a budget buys, without the deploy."""
    values = {**SMALL, "token_embedding_type": None, "calibration.samples": 6, **options}
    source, recipe = opened(trained_checkpoint("llama"), **values)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 512, (recipe.calibration.samples, 32), generator=generator)
    with (
        open_progress("quiet") as progress,
        RunDirectory(tmp_path / "run", {}, fresh=True) as directory,
    ):
        return allocate(source, recipe, tokens, directory, progress)[1]


def test_the_least_file_can_be_had_and_one_byte_less_cannot(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file of 1,000 bytes") as caught:
        bought(tmp_path, target_size=1000)
    least = int(caught.value.fix.split()[1])
    assert f"{least:,} bytes" in caught.value.why
    found = bought(tmp_path, target_size=least)
    assert found.size == least
    assert set(found.types.values()) == {"Q2_0", "Q2_K"}
    with pytest.raises(UsageError, match=f"{least - 1:,} bytes"):
        bought(tmp_path, target_size=least - 1)


def test_more_than_the_largest_file_is_not_spent(tmp_path: Path) -> None:
    found = bought(tmp_path, target_size=10**9)
    assert set(found.types.values()) == {"Q8_0"}
    assert found.losses == {}
    assert f"{found.size:,} bytes: nothing was measured" in found.notes[0]
    assert found.record()["types"]["blk.1.ffn_down.weight"] == "Q8_0"


def test_bits_of_the_file_are_counted_as_the_report_counts_them(tmp_path: Path) -> None:
    source, _ = opened(trained_checkpoint("llama"))
    parameters = source.checkpoint.num_parameters
    found = bought(tmp_path, target_bpw=6.0)
    assert found.budget == 6 * parameters // 8
    assert 8 * found.size / parameters <= 6.0


def test_pins_are_kept_and_larger_budgets_lose_less(tmp_path: Path) -> None:
    pins = {"token_embedding_type": "Q4_0", "tensor_types": ("blk.0.attn_q=Q8_0",)}
    small, large = (bought(tmp_path, target_size=s, **pins) for s in (220_000, 300_000))
    for found in (small, large):
        assert found.types[EMBEDDING] == "Q4_0"
        assert found.types["model.layers.0.self_attn.q_proj.weight"] == "Q8_0"
        assert found.size <= found.budget
        assert found.losses.keys() == found.types.keys()
    assert large.estimate < small.estimate
    assert large.before is not None
    assert small.before is not None
    assert large.before < small.before


def test_too_few_windows_are_told(tmp_path: Path) -> None:
    found = bought(tmp_path, target_size=260_000, **{"calibration.samples": 2})
    assert "too few calibration windows" in found.notes[0]
    assert any("too few calibration windows" in line for line in found.summary())


def test_a_file_of_another_size_is_not_delivered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bought(tmp_path, target_size=10**9)
    check_size(found.size, found)
    with pytest.raises(VerificationError, match=f"{found.size + 32:,} bytes"):
        check_size(found.size + 32, found)


@pytest.mark.parametrize("entry", [None, {}, {"type": "Q9_Z"}, "Q4_0", {"type": ["Q4_0"]}])
def test_a_manifest_without_types_is_refused(entry: Any) -> None:
    source, _ = opened(trained_checkpoint("llama"))
    from exporters.gguf import gguf_name

    promised = {gguf_name(name): {"type": kind} for name, kind in source.plan.types.items()}
    assert delivered_types(source, promised) == source.plan.types
    promised["blk.1.ffn_up.weight"] = entry
    with pytest.raises(InputError, match=r"what type blk.1.ffn_up.weight has"):
        delivered_types(source, promised)


def test_finished_parts_of_another_plan_are_refused() -> None:
    source, _ = opened(trained_checkpoint("llama"))
    types = dict(source.plan.types)
    check_types("tables", {"types": types}, source)
    with pytest.raises(UsageError, match="in Q2_K, and the plan is Q") as caught:
        check_types("tables", {"types": {EMBEDDING: "Q2_K"}}, source)
    assert "--fresh" in caught.value.fix


def test_a_width_without_candidates_needs_a_fallback(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", intermediate_size=120)
    with pytest.raises(PipelineError, match="cannot be stored"):
        opened(folder, target_bpw=8.0)
    source, recipe = opened(folder, target_bpw=8.0, allow_fallback=True)
    assert choices(source, recipe)["model.layers.0.mlp.down_proj.weight"] == ("F16",)
