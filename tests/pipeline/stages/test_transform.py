"""The stage: what it refuses, proves, keeps in memory, and survives."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exporters.gguf.reader import open_gguf
from pipeline import run
from pipeline.architectures.base import EMBEDDING, FINAL_NORM, HEAD
from pipeline.checkpoint import Checkpoint
from pipeline.errors import (
    InputError,
    PipelineError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from pipeline.progress import open_progress
from pipeline.recipe_files import load_recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages import transform as stage
from pipeline.stages.calibrate import prepare_texts
from pipeline.stages.load import Source, open_source
from pipeline.stages.transform import Delivered, exactness, transform
from pipeline.transforms import TRANSFORMS
from pipeline.transforms.changes import Change
from pipeline.transforms.operators import BlockRotation, Fold
from tests.deploying import deploy, digest_of_model
from tests.packed import write_packed
from tests.tiny import make_checkpoint, trained_checkpoint

QUICK = {"evaluation.chunks": 2, "runtime.llamacpp": "off", "gates.deployed_lnppl": 1.0}
CHAIN = ("equalize", "permute:spaces=inner+values+heads", "rotate:allow_untie=true,seed=3")


MEASURED_ORDERS = ("alike", "mass", "massdiff", "zigzag")


class Nowhere:
    """Keeps no parts."""

    def load(self, name: str) -> None:
        return None

    def store(self, name: str, tensors: Any, meta: Any) -> None:
        pass


def opened(folder: Path, *transforms: str, **options: Any) -> tuple[Any, Source]:
    recipe = load_recipe(
        options={"model": str(folder), "transforms": transforms, "type": "Q8_0", **options}
    ).recipe
    return recipe, open_source(recipe, allow_pickle=False)


def rewritten(folder: Path, *transforms: str, **options: Any) -> Source:
    recipe, source = opened(folder, *transforms, **options)
    with open_progress("quiet") as progress:
        windows = torch.randint(512, (4, 32), generator=torch.Generator().manual_seed(0))
        return transform(recipe, source, windows, Nowhere(), progress)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tied"), "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("untied"), "qwen2", tie_word_embeddings=False)


@pytest.mark.parametrize(
    "transforms",
    [
        ("fold",),
        ("rotate",),
        ("rotate:matrix=orthogonal,spaces=residual",),
        ("rotate:signs=false,block=16",),
        ("permute:spaces=residual+inner+values+heads",),
        ("permute:by=random,spaces=residual+inner+values+heads",),
        ("equalize:spaces=attention_norm+ffn_norm+final_norm+values+inner",),
        *(
            (f"permute:by={by},spaces=residual+inner+values+heads,block=8",)
            for by in MEASURED_ORDERS
        ),
        ("equalize:method=smoothquant,spaces=attention_norm+final_norm+values+inner",),
        ("equalize:method=awq,points=2,spaces=attention_norm+final_norm+values+inner",),
        ("rotate:matrix=learned,steps=3,blocks=1",),
        ("rotate:matrix=learned,objective=network,steps=2,batch=2",),
        ("rotate:matrix=learned,objective=network,steps=2,spaces=values", "permute"),
        ("equalize", "permute", "rotate:matrix=learned,objective=network,steps=2"),
        ("equalize", "permute", "rotate", "rotate:seed=2", "permute:by=random", "equalize"),
    ],
    ids=" ".join,
)
def test_logits_stay(transforms: tuple[str, ...], untied: Path) -> None:
    source = rewritten(untied, *transforms)
    assert source.changes
    assert [gate.status for gate in source.exactness] == ["green", "green"]
    for gate, floor in zip(source.exactness, (1e-12, 1e-5), strict=True):
        assert gate.figure < floor


def test_a_rotation_leaves_no_gain_and_moves_every_weight(untied: Path) -> None:
    source = rewritten(untied, "rotate")
    for name, shape in source.shapes.items():
        before, after = source.original(name), source.read(name)
        assert after.shape == shape
        assert after.dtype == torch.float32
        assert after.is_contiguous()
        if "norm" in name:
            assert (after == 1).all()
            assert not (before == 1).all()
        elif name.endswith(("q_proj.bias", "k_proj.bias")):
            assert torch.equal(after, before)
        else:
            assert not torch.allclose(after, before)
            if after.ndim == 2:  # a rotation keeps the energy of what it alone touches
                energy = (after.norm() / before.norm()).item()
                assert name not in (EMBEDDING,) or energy == pytest.approx(1, abs=1e-5)


def test_folding_is_all_there_is_to_a_tied_norm(tied: Path) -> None:
    source = rewritten(tied, "fold")
    assert source.rewrite_notes == ("the final norm keeps its gain: the head is the embedding",)
    assert torch.equal(source.read(FINAL_NORM), source.original(FINAL_NORM))
    folded = [c.space.name for c in source.changes if isinstance(c.operator, Fold)]
    assert folded == [f"block {i} {n}_norm" for i in (0, 1) for n in ("attention", "ffn")]
    q, gain = (f"model.layers.1.{n}.weight" for n in ("self_attn.q_proj", "input_layernorm"))
    torch.testing.assert_close(source.read(q), source.original(q) * source.original(gain))


def test_untying_needs_leave_and_names_its_price(tied: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        opened(tied, "rotate")
    text = str(caught.value)
    extra = 512 * 64 // 32 * 34  # one more table in Q8_0
    assert f"{extra:,} bytes more" in text
    assert "rotate:allow_untie=true" in text
    assert "rotate:spaces=values" in text
    source = rewritten(tied, "rotate:allow_untie=true")
    assert f"{extra:,} bytes more" in source.checkpoint.notes[-1]
    assert source.head == HEAD
    assert source.checkpoint.num_parameters == opened(tied)[1].checkpoint.num_parameters
    assert not torch.equal(source.read(HEAD), source.read(EMBEDDING))
    assert torch.equal(source.original(HEAD), source.original(EMBEDDING))
    assert rewritten(tied, "rotate:spaces=values").head == EMBEDDING


@pytest.mark.parametrize("kind", ["permute:spaces=residual", "equalize", "permute"])
def test_what_needs_no_untying_leaves_the_head_tied(kind: str, tied: Path) -> None:
    source = rewritten(tied, kind)
    assert source.head == EMBEDDING
    assert HEAD not in source.shapes
    assert torch.equal(source.read(HEAD), source.read(EMBEDDING))


def test_dry_run_shows_the_untied_head(tied: Path, tmp_path: Path) -> None:
    options = {"model": str(tied), "type": "Q8_0", "transforms": ("rotate:allow_untie=true",)}
    with open_progress("quiet") as progress:
        planned = run.plan(load_recipe(options=options), output=tmp_path / "out", progress=progress)
    assert planned["output.weight"] == planned["token_embd.weight"]


@pytest.mark.parametrize(
    ("transforms", "options", "error", "parts"),
    [
        (("online",), {}, UnsupportedError, ["online cannot be exported to GGUF", "llama.cpp's"]),
        (("rotate:block=7",), {}, UsageError, ["blocks of 7 do not divide 64", "rotate:block=7"]),
        (("fold",), {"imatrix": "x.gguf"}, UsageError, ["--imatrix cannot be combined"]),
        (("fold",), {"emit": ("imatrix",)}, UsageError, ["--emit imatrix cannot be combined"]),
    ],
)
def test_what_cannot_be_had_is_refused(
    transforms: tuple[str, ...],
    options: dict[str, Any],
    error: type[PipelineError],
    parts: list[str],
    untied: Path,
) -> None:
    with pytest.raises(error) as caught:
        rewritten(untied, *transforms, **options)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert caught.value.fix


def test_rotations_at_run_time_where_the_target_has_them(
    untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ONNX has: the reference rotates too, and nothing may change the rotated inputs again."""
    kind = replace(TRANSFORMS["online"], online="")
    monkeypatch.setitem(TRANSFORMS, "online", kind)
    source = rewritten(untied, "permute", "equalize", "online:block=16,seed=2", "rotate")
    assert [gate.status for gate in source.exactness] == ["green", "green"]
    assert source.online is not None
    assert source.online.keeps(16)
    assert not source.online.keeps(8)
    down = "model.layers.1.mlp.down_proj.weight"
    without = replace(source, changes=tuple(c for c in source.changes if c.space.kind != "online"))
    assert without.online is None
    rotated = source.online.forward(without.exact(down))
    torch.testing.assert_close(source.exact(down), rotated)
    broken = replace(source, checkpoint=source.checkpoint)
    monkeypatch.setattr(Source, "inner", None)
    assert [gate.status for gate in exactness(broken, 0)] == ["red", "red"]
    for wrong, part in (
        (("online:block=16", "permute"), "put online last"),
        (("online:block=16", "online:block=16"), "put online last"),
        (("online:block=24",), "do not divide 128"),
        (("online:block=7",), "no Hadamard matrix of order 7"),
    ):
        with pytest.raises(UsageError, match=part):
            rewritten(untied, *wrong)


def test_a_packed_checkpoint_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    write_packed(untied, folder, "gptq", symmetric=True)
    with pytest.raises(UsageError, match="4-bit already") as caught:
        opened(folder, "fold", type="Q4_0")
    assert caught.value.fix


def test_a_wrong_change_stops_the_deploy(
    tmp_path: Path, untied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Change.apply

    def forgetful(self: Change, name: str, value: torch.Tensor) -> torch.Tensor:
        return value if name.endswith("layers.1.mlp.down_proj.weight") else apply(self, name, value)

    monkeypatch.setattr(Change, "apply", forgetful)
    with pytest.raises(VerificationError, match="change what the model computes"):
        deploy(untied, tmp_path / "out", {**QUICK, "transforms": ("permute",)})
    assert not (tmp_path / "out").exists()


def test_weights_are_read_one_at_a_time(untied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The composition of all transforms reads a tensor of the file for each that is asked for."""
    source = rewritten(untied, *CHAIN)
    read, seen = Checkpoint.read, []

    def counted(self: Checkpoint, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        seen.append(name)
        return read(self, name, dtype)

    monkeypatch.setattr(Checkpoint, "read", counted)
    for name in source.shapes:
        source.read(name)
        assert seen == [name]
        seen.clear()
    vectors = sum(t.numel() for c in source.changes for t in c.operator.tensors().values())
    assert vectors < 0.06 * source.checkpoint.num_parameters


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("delivered") / "out"
    report = deploy(trained_checkpoint("llama"), output, {**QUICK, "transforms": CHAIN})
    assert report.exit_code == 0
    return output


def test_the_file_holds_the_rewritten_model(delivered: Path) -> None:
    (path,) = delivered.glob("*.gguf")
    with open_gguf(path) as file:
        names = set(file.tensors)
    assert "output.weight" in names
    manifest = json.loads((delivered / "manifest.json").read_text())
    levels = [gate["level"] for gate in manifest["report"]["gates"]]
    assert levels.count("transform") == 2
    assert manifest["input"]["tied"] is True
    assert manifest["recipe"]["transforms"] == [*CHAIN[:2], "rotate:seed=3,allow_untie=true"]
    assert any("stored apart" in note for note in manifest["report"]["notes"])
    assert "stored apart" in (delivered / "README.md").read_text()


def test_verify_repeats_the_proof(delivered: Path) -> None:
    with open_progress("quiet") as progress:
        report = run.verify(delivered, progress=progress)
    manifest = json.loads((delivered / "manifest.json").read_text())
    assert report.exit_code == 0
    assert [g.figure for g in report.gates] == [g["figure"] for g in manifest["report"]["gates"]]


def test_a_run_that_died_continues_to_the_same_bytes(
    delivered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = RunDirectory.store, []

    def dying(self: RunDirectory, *args: Any) -> None:
        store(self, *args)
        calls.append(1)
        if len(calls) == 2:
            raise OSError("power cut")

    options = {**QUICK, "transforms": CHAIN}
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "store", dying)
        with pytest.raises(OSError, match="power cut"):
            deploy(trained_checkpoint("llama"), tmp_path / "out", options)
    other = {**options, "transforms": CHAIN[:2]}
    with pytest.raises(UsageError, match=re.escape("transforms")):
        deploy(trained_checkpoint("llama"), tmp_path / "out", other)
    deploy(trained_checkpoint("llama"), tmp_path / "out", options)
    assert digest_of_model(tmp_path / "out") == digest_of_model(delivered)


def test_another_seed_gives_other_bytes(delivered: Path, tmp_path: Path) -> None:
    other = (*CHAIN[:2], "rotate:allow_untie=true,seed=4")
    deploy(trained_checkpoint("llama"), tmp_path / "out", {**QUICK, "transforms": other})
    assert digest_of_model(tmp_path / "out") != digest_of_model(delivered)


def test_the_checkpoint_is_not_touched(delivered: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained_checkpoint("llama"), tmp_path / "model"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rewritten(folder, *CHAIN)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


MEASURED = ("permute:by=massdiff,spaces=inner,block=16", "equalize:method=smoothquant")


def measuring_nothing(*_: Any) -> Any:
    raise AssertionError("measured again")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("measured") / "out"
    report = deploy(trained_checkpoint("qwen3"), output, {**QUICK, "transforms": MEASURED})
    assert report.exit_code == 0
    return output


def test_measured_changes_lie_beside_the_file(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((measured / "manifest.json").read_text())
    assert "transforms.safetensors" in manifest["files"]
    bounds = manifest["block_rotation_bounds"]
    assert [b["space"] for b in bounds] == ["block 0 inner", "block 1 inner"]
    for bound in bounds:
        assert bound["least bound"] <= bound["bound after"] < bound["bound before"]
        assert bound["bound after"] == pytest.approx(bound["largest mass after"] / 4)
    assert "can reach" in (measured / "README.md").read_text()
    monkeypatch.setattr(stage, "measuring", measuring_nothing)
    with open_progress("quiet") as progress:
        report = run.verify(measured, progress=progress)
    assert report.exit_code == 0
    assert [g.figure for g in report.gates] == [g["figure"] for g in manifest["report"]["gates"]]


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_delivered_changes_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "transforms.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=re.escape("transforms.safetensors")) as caught:
        Delivered(tmp_path).load("transforms")
    assert caught.value.fix


def test_a_resumed_run_does_not_measure_again(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunDirectory.store

    def dying(self: RunDirectory, name: str, *args: Any) -> None:
        store(self, name, *args)
        if name == "transforms":
            raise OSError("power cut")

    options = {**QUICK, "transforms": MEASURED}
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "store", dying)
        with pytest.raises(OSError, match="power cut"):
            deploy(trained_checkpoint("qwen3"), tmp_path / "out", options)
    monkeypatch.setattr(stage, "measuring", measuring_nothing)
    deploy(trained_checkpoint("qwen3"), tmp_path / "out", options)
    assert digest_of_model(tmp_path / "out") == digest_of_model(measured)


def test_a_learned_rotation_is_exact_and_says_what_it_won(tmp_path: Path) -> None:
    source = rewritten(
        trained_checkpoint("llama"),
        "rotate:matrix=learned,allow_untie=true,steps=12",
        type="Q4_0",
    )
    assert [gate.status for gate in source.exactness] == ["green", "green"]
    (note,) = (text for text in source.rewrite_notes if text.startswith("learned rotation"))
    found = re.search(r"error (\S+) of the Hadamard one, (\S+) of the best", note)
    assert found is not None
    assert float(found[2]) < 0.99 * float(found[1])
    assert any(note.startswith("values: rotated by Hadamard") for note in source.rewrite_notes)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("matrix=learned,spaces=values", "one of the residual stream"),
        ("matrix=learned,block=16", "the whole residual stream"),
        ("matrix=learned,objective=network,block=16", "the whole residual stream"),
        ("matrix=learned,batch=2", "batch needs matrix=learned and objective=network"),
        ("matrix=learned,momentum=0.3", "momentum needs matrix=learned and objective=network"),
        ("matrix=learned,objective=network,blocks=2", "blocks needs matrix=learned and objective"),
        ("objective=network", "objective=network needs matrix=learned"),
        ("matrix=orthogonal,batch=2", "batch needs matrix=learned"),
        ("blocks=2", "blocks needs matrix=learned"),
        ("steps=2", "steps=2 needs matrix=learned"),
        ("rate=0.5", "rate=0.5 needs matrix=learned"),
    ],
)
def test_what_cannot_be_learned_is_refused(options: str, part: str) -> None:
    with pytest.raises(UsageError, match="does not fit this model") as caught:
        rewritten(trained_checkpoint("llama"), f"rotate:allow_untie=true,{options}")
    assert part in str(caught.value)


def test_one_window_is_not_enough_to_learn_from(untied: Path) -> None:
    recipe, source = opened(untied, NETWORK)
    windows = torch.zeros(1, 16, dtype=torch.int64)
    with open_progress("quiet") as progress, pytest.raises(UsageError, match="to judge by"):
        transform(recipe, source, windows, Nowhere(), progress)


def test_a_space_that_a_model_lacks_is_noted(tied: Path) -> None:
    source = rewritten(tied, "equalize:spaces=final_norm+inner")
    assert any(
        note.startswith("final_norm: the model has no such") for note in source.rewrite_notes
    )


NETWORK = "rotate:matrix=learned,objective=network,allow_untie=true,steps=20,batch=2"


def learned_from_the_network(text: str, **options: Any) -> tuple[Source, float, float]:
    """What came of it, and the divergences of the held-out windows at the start and at the end."""
    windows = prepare_texts(*opened(trained_checkpoint("llama"), **options)).calibration
    recipe, source = opened(trained_checkpoint("llama"), text, **options)
    with open_progress("quiet") as progress:
        source = transform(recipe, source, windows, Nowhere(), progress)
    (note,) = (text for text in source.rewrite_notes if "learned from the network" in text)
    found = re.search(r"windows (\S+) with the Hadamard ones, (\S+) with the best", note)
    assert found is not None
    return source, float(found[1]), float(found[2])


TEXT = {
    "allow_fallback": True,
    "calibration.source": "stdlib",
    "calibration.samples": 16,
    "calibration.seqlen": 64,
}


def test_rotations_learned_from_the_network_are_exact_and_say_what_they_won() -> None:
    source, first, least = learned_from_the_network(NETWORK, type="Q2_0", **TEXT)
    assert [gate.status for gate in source.exactness] == ["green", "green"]
    assert least < 0.85 * first
    rotated = [c for c in source.changes if c.operator.does == "rotation"]
    assert [c.space.kind for c in rotated] == ["residual", "values", "values"]
    for change in rotated:
        assert isinstance(change.operator, BlockRotation)
        A = change.operator.matrices
        assert A.dtype == torch.float64
        unit = torch.eye(A.shape[-1]).double().expand_as(A)
        torch.testing.assert_close(A @ A.mT, unit, rtol=0, atol=1e-12)
        assert len(A) * A.shape[-1] == change.space.width
