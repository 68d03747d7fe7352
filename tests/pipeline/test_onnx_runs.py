"""Whole runs with ONNX as a target: what is delivered, proved, taken over, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters.gguf import gguf_name
from exporters.onnx import read_onnx
from pipeline import reexport, run
from pipeline.checkpoint import open_checkpoint
from pipeline.errors import InputError, ResourceError, UnsupportedError, UsageError
from pipeline.progress import open_progress
from pipeline.report import Report
from runtimes.gguf_weights import GGUFWeights
from runtimes.onnxruntime import OnnxRuntime
from tests.deploying import deploy, digest_of_model, gate_statuses, short_text
from tests.tiny import make_checkpoint, trained_checkpoint

QUICK = {
    "calibration.source": short_text(),
    "calibration.mismatch": 0.0,
    "quantization.refine_rounds": 0,
    "evaluation.chunks": 2,
    "runtime.llamacpp": "off",
    "gates.deployed_lnppl": 1.0,
}
"""What files say is judged here, not how good they are."""

SLOW = pytest.mark.slow

ONNX = {**QUICK, "target": "onnx"}
LEVELS = {"bytes", "tokens", "census", "twin", "greedy", "deployed", "quality"}
MODEL, DATA = "model.onnx", "model.onnx_data"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGUF and ONNX from one quantization of a tied model, with tuned norms."""
    output = tmp_path_factory.mktemp("both") / "out"
    options = {**QUICK, "target": "gguf,onnx", "type": "Q4_0", "tuning.steps": 4}
    assert deploy(trained_checkpoint("llama"), output, options).exit_code == 0
    return output


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def check(folder: Path) -> Report:
    with open_progress("quiet") as progress:
        return run.verify(folder, progress=progress)


def export(folder: Path, target: str, output: Path, **options: Any) -> Report:
    with open_progress("quiet") as progress:
        return reexport.reexport(folder, target, output=output, progress=progress, **options)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", "INT4_G32"), ("llama", "INT3_G32"), ("llama", "INT2_G32")),
        *(("qwen2", "INT4_G64"), ("qwen3", "Q2_0"), ("llama", "INT8_G128")),
        *(("llama", "UINT4_G32"), ("qwen2", "UINT2_G64"), ("llama", "UINT3_G32")),
        *(pytest.param("llama", kind, marks=SLOW) for kind in ("FP8_G64", "FINT2_G32")),
        *(pytest.param(*pair, marks=SLOW) for pair in (("qwen2", "FP4_G32"), ("qwen3", "MXFP4"))),
    ],
)
def test_every_gate_is_green(family: str, kind: str, tmp_path: Path) -> None:
    model = trained_checkpoint(family)
    report = deploy(model, tmp_path / "out", {**ONNX, "type": kind})
    assert {level for level, _ in gate_statuses(report)} == LEVELS
    assert set(gate_statuses(report).values()) == {"green"}, report.gates
    assert report.exit_code == 0
    folder = tmp_path / "out"
    assert report.size_bytes == sum((folder / name).stat().st_size for name in (MODEL, DATA))
    manifest = manifest_of(folder)
    assert manifest["verified"] is True
    assert manifest["verified_in"] == ["ONNX Runtime (default)"]
    promised = manifest["tensors"]["model.layers.1.mlp.up_proj.weight"]
    assert promised["type"] == kind
    metadata = read_onnx(folder / MODEL).metadata
    assert json.loads(metadata["piso.recipe"])["type"] == kind
    assert "model" not in json.loads(metadata["piso.recipe"])
    assert json.loads(metadata["piso.versions"])["onnx-ir"]


def test_the_census_names_what_is_never_fused_or_not_standard(tmp_path: Path) -> None:
    options = {**ONNX, "type": "FINT4_G32", "tensor_types": ("ffn_down=FP8_G32", "ffn_up=FP4_G32")}
    report = deploy(trained_checkpoint("llama"), tmp_path / "out", options)
    assert report.exit_code == 0, report.gates
    for gate in (gate for gate in report.gates if gate.level == "census"):
        assert (gate.figure, gate.limit) == ("13 fused, 2 expanded", "13 fused, 2 DequantizeLinear")
        assert "2 with FP8 are never fused" in gate.claim
        assert "10 with float zero points are that in the file" in gate.claim


def test_both_files_hold_the_tuned_gains(both: Path) -> None:
    manifest = manifest_of(both)
    tuning = manifest["tuning"]
    assert tuning["kept"] > 0
    assert tuning["after"] < tuning["before"]
    assert any("norm gains tuned" in note for note in manifest["report"]["notes"])
    gguf = GGUFWeights(both / manifest["model_file"], manifest_config(both))
    onnx_file = read_onnx(both / MODEL)
    original = open_checkpoint(str(trained_checkpoint("llama")))
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        gain = gguf.read(name)
        assert torch.equal(gain, torch.from_numpy(onnx_file.floats(name)))
        assert not torch.equal(gain, original.read(name, torch.float32))
    gguf.close()


def manifest_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_what_is_exported_again_still_says_how_gains_were_tuned(both: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    report = export(both, "onnx", again)
    assert report.exit_code == 0
    assert any("norm gains tuned" in note for note in report.notes)
    assert manifest_of(again)["tuning"] == manifest_of(both)["tuning"]
    for name in ("model.norm.weight", "model.layers.0.post_attention_layernorm.weight"):
        gain = read_onnx(both / MODEL).floats(name)
        assert np.array_equal(read_onnx(again / MODEL).floats(name), gain)


def test_rules_for_single_tensors_are_taken_over_in_the_other_formats_names(tmp_path: Path) -> None:
    rules = ("ffn_down=INT2_G64", "attn_q=INT4_G32")
    options = {**ONNX, "type": "INT4_G32", "tensor_types": rules}
    assert deploy(trained_checkpoint("llama"), tmp_path / "out", options).exit_code == 0
    assert export(tmp_path / "out", "gguf", tmp_path / "again").exit_code == 0
    manifest = manifest_of(tmp_path / "again")
    assert manifest["recipe"]["tensor_types"] == ["ffn_down=Q2_0", "attn_q=Q4_0"]
    assert manifest["tensors"]["blk.0.ffn_down.weight"]["type"] == "Q2_0"
    assert manifest["tensors"]["blk.0.attn_q.weight"]["type"] == "Q4_0"


def test_the_folder_is_what_others_load(both: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    checkpoint = trained_checkpoint("llama")
    manifest = manifest_of(both)
    assert {p.name for p in both.iterdir()} == {*manifest["files"], "manifest.json"}
    assert {MODEL, DATA, "genai_config.json", "config.json"} < set(manifest["files"])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (both / name).read_bytes() == (checkpoint / name).read_bytes()
    text = "def f(x):\n    return x + 1\n"
    theirs, ours = (AutoTokenizer.from_pretrained(str(p)) for p in (checkpoint, both))
    assert ours(text).input_ids == theirs(text).input_ids
    assert AutoConfig.from_pretrained(str(both)).model_type == "llama"
    onnx.checker.check_model(str(both / MODEL), full_check=True)


def test_optimum_generates_from_the_folder(both: Path) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    import onnxruntime as ort
    from transformers import AutoTokenizer

    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    model = optimum.ORTModelForCausalLM.from_pretrained(both, session_options=options)
    tokenizer = AutoTokenizer.from_pretrained(both)
    ids = tokenizer("import os\n", return_tensors="pt").input_ids
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(input_ids=ids, **settings)[0, ids.shape[1] :]
    assert found.tolist() == OnnxRuntime(both / MODEL).greedy(ids[0].tolist(), 16)


def test_both_files_hold_the_same_codes_and_scales(both: Path) -> None:
    config = json.loads((both / "config.json").read_text())
    (path,) = both.glob("*.gguf")
    weights, file = GGUFWeights(path, config), read_onnx(both / MODEL)
    compared = 0
    for name, kind in file.types.items():
        if kind != "F32":
            assert weights.type_of(gguf_name(name)) == kind
            assert torch.equal(weights.read(name), file.quantized(name).dequantize())
            compared += 1
    assert compared == 15
    weights.close()


def test_both_ladders_are_climbed_and_climbed_again(both: Path) -> None:
    gates = manifest_of(both)["report"]["gates"]
    runtimes = {gate["runtime"] for gate in gates if gate["level"] == "deployed"}
    assert runtimes == {"ggml emulator", "llama.cpp", "ONNX Runtime (default)"}
    report = check(both)
    assert report.exit_code == 0
    assert [g.figure for g in report.gates] == [gate["figure"] for gate in gates]
    names = [(quality.protocol, quality.runtime) for quality in report.qualities]
    assert len(set(names)) == len(names)
    assert any("model.onnx takes" in note for note in report.notes)


@pytest.mark.parametrize("name", [MODEL, DATA, "tokenizer.json"])
def test_verify_notices_one_flipped_bit(name: str, both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "copy"))
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match="not the file that was delivered"):
        check(folder)


def test_a_manifest_whose_onnx_file_is_not_listed(both: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(both, tmp_path / "copy"))
    manifest = manifest_of(folder)
    manifest["onnx"]["model_file"] = "../model.onnx"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="lists no model file"):
        check(folder)


@pytest.mark.parametrize("key", ["gates.twin", "gates.logits"])
def test_a_red_gate_delivers_nothing(key: str, tmp_path: Path) -> None:
    report = deploy(trained_checkpoint("llama"), tmp_path / "out", {**ONNX, key: 1e-15})
    assert report.exit_code == 14
    assert {gate.level for gate in report.red()} <= {"twin", "greedy"}
    assert report.output is None
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for module, name in (("exporters.onnx.writer.ir", "save"), ("shutil", "copyfile")):
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.{name}", full)
            with pytest.raises(ResourceError, match="cannot write"):
                deploy(trained_checkpoint("llama"), tmp_path / "out", ONNX)
        assert [path.name for path in tmp_path.iterdir()] == ["out.piso-run"]
    assert deploy(trained_checkpoint("llama"), tmp_path / "out", ONNX).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tokenizer_that_gguf_has_no_words_for_is_no_matter_for_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedError("no such rules in llama.cpp")

    monkeypatch.setattr("pipeline.stages.load.read_vocabulary", refuse)
    with pytest.raises(UnsupportedError, match="no such rules"):
        deploy(trained_checkpoint("llama"), tmp_path / "out", {**ONNX, "target": "gguf,onnx"})
    assert deploy(trained_checkpoint("llama"), tmp_path / "out", ONNX).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "INT4_G32", "tensor_types": ("ffn_up=INT2_G64",)}, "126 outputs, which 2 bits"),
        ({"type": "FP8_G32", "pure": True, "token_embedding_type": None}, "embedding in FP8_G32"),
        ({"type": "INT2_G64"}, "126 outputs, which 2 bits cannot hold"),
    ],
)
def test_what_onnx_cannot_hold_is_refused_before_any_work(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_checkpoint(tmp_path / "model", "llama", intermediate_size=126)
    monkeypatch.setattr(run, "quantize", None)
    with pytest.raises(UnsupportedError, match=message):
        deploy(model, tmp_path / "out", {**ONNX, **options, "allow_fallback": True})


def test_export_gives_the_file_that_a_deploy_would_have_given(both: Path, tmp_path: Path) -> None:
    """From the GGUF file to ONNX and back: the same bytes of weights each time."""
    report = export(both, "onnx", tmp_path / "onnx", attention="gqa")
    assert report.exit_code == 0
    assert {level for level, _ in gate_statuses(report)} == LEVELS
    assert (tmp_path / "onnx" / DATA).read_bytes() == (both / DATA).read_bytes()
    graph = onnx.load(str(tmp_path / "onnx" / MODEL), load_external_data=False).graph
    assert sum(node.op_type == "GroupQueryAttention" for node in graph.node) == 2
    assert export(tmp_path / "onnx", "gguf", tmp_path / "gguf").exit_code == 0
    assert digest_of_model(tmp_path / "gguf") == digest_of_model(both)
    assert check(tmp_path / "gguf").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gguf", "onnx"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("INT4_G32", "Q4_0"),
        ("INT2_G64", "Q2_0"),
        pytest.param("MXFP4", "MXFP4", marks=SLOW),
    ],
)
def test_integer_types_have_other_names_in_gguf(kind: str, name: str, tmp_path: Path) -> None:
    deploy(trained_checkpoint("llama"), tmp_path / "onnx", {**ONNX, "type": kind})
    assert export(tmp_path / "onnx", "gguf", tmp_path / "gguf").exit_code == 0
    types = {n: t["type"] for n, t in manifest_of(tmp_path / "gguf")["tensors"].items()}
    assert types["blk.0.attn_q.weight"] == name
    config = json.loads((tmp_path / "onnx" / "config.json").read_text())
    (path,) = (tmp_path / "gguf").glob("*.gguf")
    weights, file = GGUFWeights(path, config), read_onnx(tmp_path / "onnx" / MODEL)
    matrix = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(weights.read(matrix), file.quantized(matrix).dequantize())
    weights.close()


def test_tables_that_the_target_cannot_hold_are_made_anew_and_counted(tmp_path: Path) -> None:
    options = {**QUICK, "type": "Q4_0", "pure": True, "token_embedding_type": "Q5_0"}
    deploy(trained_checkpoint("llama"), tmp_path / "gguf", options)
    report = export(tmp_path / "gguf", "onnx", tmp_path / "onnx")
    assert report.exit_code == 0
    assert report.counts["types replaced"] == 1
    assert any("Q5_0 -> Q8_0 (made anew" in note for note in report.notes)
    again = check(tmp_path / "onnx")
    assert again.exit_code == 0
    assert [g.claim for g in again.gates] == [g.claim for g in report.gates]
    matrix = "model.layers.0.mlp.down_proj.weight"
    before, after = (manifest_of(tmp_path / name)["tensors"] for name in ("gguf", "onnx"))
    assert before[gguf_name(matrix)]["sha256_float32"] == after[matrix]["sha256_float32"]


@pytest.mark.parametrize(
    ("tables", "replaced"),
    [
        ({"pure": True, "token_embedding_type": "Q4_1"}, "Q4_1 -> Q8_0 (made anew"),
        ({"token_embedding_type": "Q8_0", "output_tensor_type": "Q5_0"}, "Q5_0 -> Q8_0 (made anew"),
    ],
    ids=["pure", "own head"],
)
def test_tables_that_onnx_cannot_hold(
    tables: dict[str, Any], replaced: str, tmp_path: Path
) -> None:
    deploy(trained_checkpoint("llama"), tmp_path / "gguf", {**QUICK, "type": "Q4_0", **tables})
    report = export(tmp_path / "gguf", "onnx", tmp_path / "onnx")
    assert report.exit_code == 0
    assert any(replaced in note for note in report.notes)


def test_a_narrow_table_is_taken_over_from_gguf_and_back(tmp_path: Path) -> None:
    options = {**QUICK, "type": "Q4_0", "token_embedding_type": "Q4_0"}
    deploy(trained_checkpoint("llama"), tmp_path / "gguf", options)
    report = export(tmp_path / "gguf", "onnx", tmp_path / "onnx")
    assert report.exit_code == 0
    assert not report.counts["types replaced"]
    assert manifest_of(tmp_path / "onnx")["tensors"][EMBEDDING]["type"] == "Q4_0"
    assert export(tmp_path / "onnx", "gguf", tmp_path / "again").exit_code == 0
    assert digest_of_model(tmp_path / "again") == digest_of_model(tmp_path / "gguf")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target": "gguf,onnx", "type": "Q4_0", "token_embedding_type": "Q4_0"}),
        pytest.param("qwen2", {"type": "INT4_G32", "token_embedding_type": "INT4_G32"}, marks=SLOW),
        pytest.param(
            "llama", {"type": "UINT4_G32", "token_embedding_type": None, "pure": True}, marks=SLOW
        ),
        ("qwen3", {"type": "INT4_G32", "token_embedding_type": "UINT2_G32"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["type"],
)
def test_tables_of_packed_rows(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = trained_checkpoint(family)
    report = deploy(model, tmp_path / "out", {**ONNX, **options})
    assert report.exit_code == 0, report.gates
    census = next(gate for gate in report.gates if gate.level == "census")
    config = json.loads((model / "config.json").read_text())
    tied = config.get("tie_word_embeddings", False)
    held = [n for n in read_onnx(tmp_path / "out" / MODEL).types if n.startswith("lm_head")]
    assert bool(held) != tied
    assert census.figure == "15 fused"
    kind = options["token_embedding_type"] or options["type"]
    assert read_onnx(tmp_path / "out" / MODEL).types[EMBEDDING] == kind


def test_what_cannot_be_taken_over(both: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UsageError, match="unknown target 'ggfu'"):
        export(both, "ggfu", output)
    with pytest.raises(InputError, match="not the checkpoint"):
        export(both, "onnx", output, model=str(trained_checkpoint("qwen2")))
    with pytest.raises(UsageError, match="not empty"):
        export(both, "onnx", both)
    mixed = {**QUICK, "type": "Q4_0", "tensor_types": ("ffn_down=Q4_1",)}
    deploy(trained_checkpoint("llama"), tmp_path / "mixed", mixed)
    with pytest.raises(UnsupportedError, match=r"down_proj\.weight is Q4_1, which onnx cannot"):
        export(tmp_path / "mixed", "onnx", output)
    deploy(trained_checkpoint("llama"), tmp_path / "three", {**ONNX, "type": "INT3_G32"})
    with pytest.raises(UsageError, match="GGUF cannot hold INT3_G32"):
        export(tmp_path / "three", "gguf", output)
    assert not output.exists()


def test_a_matrix_of_a_mix_that_the_target_cannot_hold_is_named(both: Path, tmp_path: Path) -> None:
    """Q4_0 as a mix stores some matrices as Q4_1: the recipe does not tell, the manifest does."""
    folder = Path(shutil.copytree(both, tmp_path / "copy"))
    manifest = manifest_of(folder)
    manifest["tensors"]["blk.0.ffn_down.weight"]["type"] = "Q4_1"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.down_proj\.weight is Q4_1"):
        export(folder, "onnx", tmp_path / "out")


def test_weights_that_decode_to_something_else_are_not_taken_over(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = GGUFWeights.rows

    def damaged(self: GGUFWeights, name: str) -> np.ndarray:
        found = rows(self, name)
        found[0, 2] ^= 1
        return found

    monkeypatch.setattr(GGUFWeights, "rows", damaged)
    from pipeline.errors import VerificationError

    with pytest.raises(VerificationError, match="do not give its weights"):
        export(both, "onnx", tmp_path / "out")
