"""Whole runs on tiny models: what is delivered, resumed, repeated, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import run
from pipeline.cli import main
from pipeline.errors import InputError, UnsupportedError
from pipeline.progress import open_progress
from pipeline.run_directory import RunDirectory
from pipeline.stages import model_files
from pipeline.stages import verify as ladder
from tests.deploying import SMALL, deploy, digest_of_model
from tests.tiny import make_checkpoint, trained_checkpoint

QUICK = {"evaluation.chunks": 2, "runtime.llamacpp": "off", "gates.deployed_lnppl": 1.0}
"""For tests that do not judge the figures."""


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("delivered") / "out"
    assert deploy(trained_checkpoint("llama"), output, QUICK).exit_code == 0
    return output


def test_the_folder_holds_what_the_manifest_says(delivered: Path) -> None:
    manifest = json.loads((delivered / "manifest.json").read_text())
    assert {p.name for p in delivered.iterdir()} == {*manifest["files"], "manifest.json"}
    assert set(manifest["files"]) == {manifest["model_file"], "recipe.toml", "README.md"}
    assert manifest["input"]["files"]["model.safetensors"]["size"] > 0
    assert (
        manifest["versions"]["torch"] == torch.__version__.split("+")[0] or "+" in torch.__version__
    )
    assert manifest["report"]["counts"] == {
        "types replaced": 0,
        "sites with raised damping": 0,
        "dead inputs": 0,
        "matrices repacked inexactly": 0,
        "damaged parts recomputed": 0,
        "calibration samples missing": 0,
        "calibration tokens beyond the model's context cut from each sample": 0,
        "evaluation tokens beyond the model's context cut from each chunk": 0,
        "evaluation chunks missing": 0,
    }
    assert len(manifest["sites"]) == 2 * 4
    assert not delivered.with_name("out.piso-run").exists()


def test_the_same_recipe_gives_the_same_bytes(delivered: Path, tmp_path: Path) -> None:
    deploy(trained_checkpoint("llama"), tmp_path / "again", QUICK)
    assert digest_of_model(tmp_path / "again") == digest_of_model(delivered)


@pytest.mark.parametrize("option", [{"seed": 1}, {"calibration.mismatch": 0.5}])
def test_another_recipe_gives_other_bytes(
    option: dict[str, Any], delivered: Path, tmp_path: Path
) -> None:
    deploy(trained_checkpoint("llama"), tmp_path / "other", {**QUICK, **option})
    assert digest_of_model(tmp_path / "other") != digest_of_model(delivered)


@pytest.mark.parametrize("parts", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_a_run_that_died_after_any_part_continues_to_the_same_bytes(
    parts: int, delivered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = RunDirectory.store, []

    def dying(self: RunDirectory, *args: Any) -> None:
        store(self, *args)
        calls.append(1)
        if len(calls) == parts:
            raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "store", dying)
        with pytest.raises(OSError, match="power cut"):
            deploy(trained_checkpoint("llama"), tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()
    deploy(trained_checkpoint("llama"), tmp_path / "out", QUICK)
    assert digest_of_model(tmp_path / "out") == digest_of_model(delivered)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_run_that_died_between_publishing_and_cleaning_up_is_done(
    delivered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "delete", lambda self: (_ for _ in ()).throw(OSError("cut")))
        with pytest.raises(OSError, match="cut"):
            deploy(trained_checkpoint("llama"), tmp_path / "out", QUICK)
    report = deploy(trained_checkpoint("llama"), tmp_path / "out", QUICK)
    assert report.exit_code == 0
    assert report.output == tmp_path / "out"
    assert digest_of_model(tmp_path / "out") == digest_of_model(delivered)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_red_parity_gate_delivers_nothing(tmp_path: Path) -> None:
    options = {**QUICK, "gates.deployed_kld": 1e-15}
    report = deploy(trained_checkpoint("llama"), tmp_path / "out", options)
    assert report.exit_code == 14
    assert report.output is None
    assert not (tmp_path / "out").exists()


def test_a_red_quality_gate_delivers_the_folder_marked_unverified(tmp_path: Path) -> None:
    options = {**QUICK, "type": "Q2_0", "gates.max_ln_ppl_increase": 1e-6}
    report = deploy(trained_checkpoint("llama"), tmp_path / "out", options)
    assert report.exit_code == 3
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["verified"] is False


def check(folder: Path) -> Any:
    with open_progress("quiet") as progress:
        return run.verify(folder, progress=progress)


def test_verify_climbs_the_same_ladder(delivered: Path) -> None:
    report = check(delivered)
    manifest = json.loads((delivered / "manifest.json").read_text())
    assert report.exit_code == 0
    assert [g.figure for g in report.gates] == [g["figure"] for g in manifest["report"]["gates"]]


@pytest.mark.parametrize("name", ["*.gguf", "recipe.toml", "README.md"])
def test_verify_notices_one_flipped_bit(name: str, delivered: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(delivered, tmp_path / "copy"))
    (path,) = folder.glob(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="not the file that was delivered"):
        check(folder)


def test_verify_notices_another_original(delivered: Path) -> None:
    with (
        open_progress("quiet") as progress,
        pytest.raises(InputError, match="not the checkpoint that this folder was made from"),
    ):
        run.verify(delivered, model=str(trained_checkpoint("qwen2")), progress=progress)


def test_the_bytes_gate_is_red_for_a_file_that_is_not_what_the_solver_decided(
    delivered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    climb = ladder.climb

    def other_promise(path: Path, promised: dict[str, Any], *args: Any) -> Any:
        first = next(iter(promised))
        return climb(path, promised | {first: {**promised[first], "sha256_float32": "0"}}, *args)

    monkeypatch.setattr(model_files, "climb", other_promise)
    report = check(delivered)
    assert report.exit_code == 14
    assert {g.level for g in report.red()} == {"bytes"}


def broken(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "nan":
        tensors = load_file(weights)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        save_file(tensors, weights, {"format": "pt"})
    elif how == "missing shard":
        next(folder.glob("model-00002-*.safetensors")).unlink()
    elif how == "unknown architecture":
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("truncated", 10, "model.safetensors"),
        ("nan", 10, "model.layers.1.mlp.up_proj.weight"),
        ("missing shard", 10, "model-00002-of-"),
        ("unknown architecture", 11, "mamba"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    how: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = 100_000 if how == "missing shard" else None
    model = make_checkpoint(tmp_path / "model", "llama", shard_bytes=shards)
    broken(model, how)
    assert exit_code(model, tmp_path / "out") == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def exit_code(model: Path, output: Path, *more: str) -> int:
    options = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    with pytest.raises(SystemExit) as ended:
        main(["deploy", str(model), "--output", str(output), *options, *more])
    return int(ended.value.code or 0)


def test_a_wrong_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(tmp_path / "nothing", tmp_path / "out") == 10
    assert "nothing" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_checkpoint(tmp_path / "model", "llama")
    (tmp_path / "file").write_text("in the way")
    assert exit_code(model, tmp_path / "file" / "out") == 2
    assert "cannot write to" in capsys.readouterr().err


def test_a_width_that_does_not_divide_is_refused_or_replaced_and_counted(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", intermediate_size=160, hidden_size=64)
    tables = {"token_embedding_type": "Q6_K", "output_tensor_type": "Q6_K"}
    options = {**QUICK, "type": "Q2_0", **tables}
    with pytest.raises(UnsupportedError, match="4 matrices"):
        deploy(model, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    report = deploy(model, tmp_path / "out", {**options, "allow_fallback": True})
    assert report.counts["types replaced"] == 4
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    types = {name: tensor["type"] for name, tensor in manifest["tensors"].items()}
    assert {types[f"blk.0.{name}.weight"] for name in ("attn_q", "ffn_up")} == {"Q2_0"}
    assert types["blk.0.ffn_down.weight"] == "Q4_0"
    assert {types["token_embd.weight"], types["output.weight"]} == {"Q8_0"}
    assert sum("type replaced" in note for note in report.notes) == 4


def test_an_untied_output_tensor_of_its_own_type(tmp_path: Path) -> None:
    options = {**QUICK, "output_tensor_type": "Q5_0"}
    deploy(trained_checkpoint("llama"), tmp_path / "out", options)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["tensors"]["output.weight"]["type"] == "Q5_0"
    assert manifest["tensors"]["token_embd.weight"]["type"] == "Q8_0"


def test_llama_cpp_can_be_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder.llamacpp, "available", lambda: False)
    with pytest.raises(UnsupportedError, match="required and not installed"):
        deploy(
            trained_checkpoint("llama"), tmp_path / "out", {**QUICK, "runtime.llamacpp": "require"}
        )
