"""Quantized weights in ONNX files: exact values, exact round trip, fused into MatMulNBits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from exporters.onnx import integer_weight, read_onnx
from exporters.onnx.integers import quantized_tensor, stored_bytes
from pipeline.errors import InputError, VerificationError
from pipeline.quantization.formats import get_format
from tests.onnx_models import (
    EMBEDDING,
    HEAD,
    LINEARS,
    TinyModel,
    census,
    random_ids,
    rounded,
    run,
    session,
)

TOLERANCE = 2e-5
SYMMETRIC = ("Q2_0", "Q4_0", "Q8_0", "INT2_G32", "INT3_G16", "INT4_G64", "INT8_G64")
ZERO_POINTS = ("UINT2_G32", "UINT3_G64", "UINT4_G16", "UINT4_G32")
MATRICES = (*SYMMETRIC, *ZERO_POINTS)
STORED = {"Q2_0": 2, "Q4_0": 4, "Q8_0": 8, "INT2_G32": 2, "INT3_G16": 4, "INT4_G64": 4}
MLP = "model.layers.0.mlp"


def linears(kind: str, table: str = "F16", head: str = "F16") -> Callable[[str], str]:
    return lambda name: {EMBEDDING: table, HEAD: head}.get(name, kind)


@pytest.mark.parametrize("kind", MATRICES)
def test_what_runs_is_what_was_solved(kind: str, tmp_path: Path) -> None:
    model = TinyModel("qwen2", linears(kind))
    path = model.write(tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    ids = random_ids(2, 20)
    logits, _ = run(session(path), ids)
    assert np.abs(logits - model.logits(ids)).max() < TOLERANCE


@pytest.mark.parametrize("kind", MATRICES)
def test_every_linear_is_fused(kind: str, tmp_path: Path) -> None:
    path = TinyModel("qwen3", linears(kind, head="INT8_G32")).write(tmp_path)
    left = census(path, tmp_path)
    assert left["MatMulNBits"] == LINEARS + 1
    assert left["DequantizeLinear"] == left["unfused linear"] == 0


@pytest.mark.parametrize(
    ("kind", "opset", "ir_version"), [("INT4_G32", 23, 11), ("INT3_G32", 23, 11), ("Q2_0", 25, 13)]
)
@pytest.mark.parametrize("attention", ["standard", "primitive", "gqa"])
def test_versions_rise_only_for_2_bits(
    kind: str, opset: int, ir_version: int, attention: str, tmp_path: Path
) -> None:
    if attention == "primitive" and opset == 23:
        opset, ir_version = 21, 10
    model = TinyModel("llama", linears(kind))
    path = model.write(tmp_path, attention=attention)
    proto = onnx.load(str(path), load_external_data=False)
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    assert (versions[""], proto.ir_version) == (opset, ir_version)
    ids = random_ids(1, 12)
    logits, _ = run(session(path), ids)
    assert np.abs(logits - model.logits(ids)).max() < TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("table", ["F32", "F16", "INT8_G32", "Q8_0"])
def test_embedding_and_head(table: str, tied: bool, tmp_path: Path) -> None:
    model = TinyModel(
        "llama", linears("INT4_G32", table, head="INT4_G16"), tie_word_embeddings=tied
    )
    path = model.write(tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    ids = random_ids(2, 20)
    logits, _ = run(session(path), ids)
    assert np.abs(logits - model.logits(ids)).max() < TOLERANCE
    left = census(path, tmp_path)
    assert left["DequantizeLinear"] == 0
    fused_head = not tied or table not in ("F32", "F16")
    assert left["MatMulNBits"] == LINEARS + fused_head
    assert left["unfused linear"] == 1 - fused_head


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    path = TinyModel("llama", linears("INT4_G32", "INT8_G32"), tie_word_embeddings=True).write(
        tmp_path
    )
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    assert [t.name for t in tensors if 512 in t.dims] == [
        f"{EMBEDDING}_quantized",
        f"{EMBEDDING}_scale",
    ]


def test_a_tied_checkpoint_may_have_a_head_of_its_own_type(tmp_path: Path) -> None:
    """A quantized head beside fp16 rows, although both came from one tensor."""
    model = TinyModel("llama", linears("INT4_G32", "F16", "INT4_G32"))
    model.config["tie_word_embeddings"] = True
    path = model.write(tmp_path)
    ids = random_ids(1, 20)
    assert np.abs(run(session(path), ids)[0] - model.logits(ids)).max() < TOLERANCE


def test_the_default_mode_of_the_runtime_rounds_activations(tmp_path: Path) -> None:
    """Why parity is measured under the exact option: without it logits are 1000 times further."""
    model = TinyModel("llama", linears("INT4_G32"))
    path, ids = model.write(tmp_path), random_ids(1, 20)
    logits, _ = run(session(path, {}), ids)
    assert 1e-3 < np.abs(logits - model.logits(ids)).max() < 1


@pytest.mark.parametrize("kind", [*SYMMETRIC, "INT2_G128", "INT8_G256", "INT3_G256"])
def test_codes_and_scales_come_back_bit_for_bit(kind: str) -> None:
    fmt = get_format(kind)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 512, generator=generator)
    solved = rounded(weight, kind)
    solved.codes[0, :3] = torch.tensor([fmt.levels[0], 0, fmt.levels[-1]])
    solved.scales["d"][1, 0] = 0.0
    solved.scales["d"][2, 0] = -65504.0
    solved.scales["d"][3, 0] = 2.0**-24
    stored = integer_weight(solved)
    assert np.array_equal(stored.dequantize(), solved.dequantize().numpy())
    back = quantized_tensor(stored, fmt)
    assert torch.equal(back.codes, solved.codes)
    assert torch.equal(back.scales["d"].view(torch.int32), solved.scales["d"].view(torch.int32))


@pytest.mark.parametrize("kind", ZERO_POINTS)
def test_zero_points_come_back_bit_for_bit(kind: str) -> None:
    fmt = get_format(kind)
    solved = rounded(torch.randn(12, 512, generator=torch.Generator().manual_seed(0)), kind)
    d, m = solved.scales["d"], solved.scales["m"]
    top = fmt.levels[-1]
    d[1, 0], m[1, 0] = 0.0, 0.0
    d[2, 0], m[2, 0] = 65504.0, -65504.0 * top
    d[3, 0], m[3, 0] = 2.0**-24, 0.0
    stored = integer_weight(solved)
    assert np.array_equal(stored.dequantize(), solved.dequantize().numpy())
    assert stored.zeros is not None
    assert stored.zeros[:4, 0].tolist()[1:] == [0, top, 0]
    back = quantized_tensor(stored, fmt)
    assert torch.equal(back.codes, solved.codes)
    for name in ("d", "m"):
        same = back.scales[name].view(torch.int32) == solved.scales[name].view(torch.int32)
        assert same.all()
    m[4, 0] += 0.5 * d[4, 0]
    with pytest.raises(VerificationError, match="no zero point"):
        integer_weight(solved)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [*MATRICES, "UINT2_G64", "UINT4_G64"])
def test_a_matrix_is_as_large_as_announced(kind: str, packed: bool, tmp_path: Path) -> None:
    """Zero points of 64 rows of one group among them, which together fill whole bytes."""
    model = TinyModel("llama", linears(kind), packed=packed)
    proto = onnx.load(str(model.write(tmp_path)))
    for name, shape in (
        (f"{MLP}.down_proj.weight", (64, 128)),
        (f"{MLP}.up_proj.weight", (128, 64)),
    ):
        held = [t for t in proto.graph.initializer if t.name.startswith(name)]
        wanted = stored_bytes(get_format(kind), shape, name, packed=packed)
        assert sum(len(t.raw_data) for t in held) == wanted


@pytest.mark.parametrize("kind", ["UINT2_G32", "UINT4_G32"])
def test_zero_points_are_stored_as_the_codes_are(kind: str, tmp_path: Path) -> None:
    path = TinyModel("llama", linears(kind)).write(tmp_path)
    proto = onnx.load(str(path), load_external_data=False)
    name = "model.layers.0.mlp.down_proj.weight"
    found = {t.name: t for t in proto.graph.initializer}
    codes, zeros = found[f"{name}_quantized"], found[f"{name}_zero_point"]
    wanted = onnx.TensorProto.UINT2 if kind == "UINT2_G32" else onnx.TensorProto.UINT4
    assert codes.data_type == zeros.data_type == wanted
    assert (list(codes.dims), list(zeros.dims)) == ([128, 64], [4, 64])


def test_damaged_zero_points_are_noticed(tmp_path: Path) -> None:
    path = TinyModel("llama", linears("UINT4_G32")).write(tmp_path)
    proto = onnx.load(str(path))
    name = "model.layers.0.mlp.down_proj.weight"
    zeros = next(t for t in proto.graph.initializer if t.name == f"{name}_zero_point")
    for array in (np.zeros((4, 64), np.uint8), np.zeros((2, 64), ml_dtypes.uint4)):
        zeros.CopyFrom(numpy_helper.from_array(array, zeros.name))
        onnx.save(proto, str(path), save_as_external_data=True, location="model.onnx_data")
        with pytest.raises(InputError, match=r"zero[ _]point"):
            read_onnx(path).quantized(name)
        proto = onnx.load(str(path))
        zeros = next(t for t in proto.graph.initializer if t.name == f"{name}_zero_point")


@pytest.mark.parametrize("kind", MATRICES)
def test_a_file_gives_back_all_its_tensors(kind: str, tmp_path: Path) -> None:
    model = TinyModel("qwen2", linears(kind, "INT8_G64", "F16"))
    file = read_onnx(model.write(tmp_path, provenance={"piso.recipe": "{}"}))
    assert file.metadata["piso.recipe"] == "{}"
    assert file.types == {entry.name: entry.type for entry in model.entries}
    for name, parameter in model.torch.named_parameters():
        if name not in model.solved:
            assert np.array_equal(file.floats(name), parameter.detach().numpy())
            continue
        back, solved = file.quantized(name), model.solved[name]
        assert back.format == solved.format
        assert torch.equal(back.codes, solved.codes)
        assert back.scales.keys() == solved.scales.keys()
        assert all(torch.equal(back.scales[n], solved.scales[n]) for n in back.scales)


@pytest.mark.parametrize(("kind", "bits"), STORED.items())
def test_codes_lie_packed_in_the_smallest_integers(kind: str, bits: int, tmp_path: Path) -> None:
    """Bytes as the ONNX specification packs them: first element in the lowest bits."""
    model = TinyModel("llama", linears(kind))
    proto = onnx.load(str(model.write(tmp_path)))
    name = "model.layers.0.mlp.down_proj.weight"
    tensor = next(t for t in proto.graph.initializer if t.name == f"{name}_quantized")
    assert len(tensor.raw_data) == 64 * 128 * bits // 8
    per_byte, raw = 8 // bits, np.frombuffer(tensor.raw_data, np.uint8)
    spread = (raw[:, None] >> (bits * np.arange(per_byte)) & (2**bits - 1)).astype(np.int64)
    sign_bit = 1 << (bits - 1)
    codes = ((spread ^ sign_bit) - sign_bit).reshape(128, 64).T
    sign = -1 if kind == "Q2_0" else 1
    assert np.array_equal(sign * codes, model.solved[name].codes.numpy())
    scale = next(t for t in proto.graph.initializer if t.name == f"{name}_scale")
    assert np.array_equal(
        sign * numpy_helper.to_array(scale).T, model.solved[name].scales["d"].numpy()
    )


@pytest.mark.parametrize(
    ("kind", "head", "exact"),
    [("INT4_G32", "F16", True), ("INT4_G32", "INT8_G32", False), ("Q2_0", "F16", False)],
)
def test_genai_config_asks_for_exact_products_where_they_are_fast(
    kind: str, head: str, exact: bool, tmp_path: Path
) -> None:
    TinyModel("qwen3", linears(kind, head=head)).write(tmp_path)
    config = json.loads((tmp_path / "genai_config.json").read_text(encoding="utf-8"))
    options = {"session.qdq_matmulnbits_accuracy_level": "1"} if exact else {}
    assert config["model"]["decoder"]["session_options"] == options
    # What the runtime does with them: its node has the level that was asked for.
    optimized = tmp_path / "optimized.onnx"
    session(tmp_path / config["model"]["decoder"]["filename"], options, optimized)
    nodes = onnx.load(str(optimized), load_external_data=False).graph.node
    levels = {
        attribute.i
        for node in nodes
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == ({1} if exact else {4})


def test_genai_config_agrees_with_the_graph(tmp_path: Path) -> None:
    model = TinyModel("qwen3", head_dim=32)
    runtime = session(model.write(tmp_path))
    config = json.loads((tmp_path / "genai_config.json").read_text(encoding="utf-8"))["model"]
    decoder = config["decoder"]
    inputs = {value.name: value.shape for value in runtime.get_inputs()}
    layers = range(decoder["num_hidden_layers"])
    pasts = {decoder["inputs"][f"past_{w}_names"] % n for w in ("key", "value") for n in layers}
    assert set(inputs) == {"input_ids", "attention_mask", "position_ids"} | pasts
    outputs = {
        decoder["outputs"][f"present_{w}_names"] % n for w in ("key", "value") for n in layers
    }
    assert {value.name for value in runtime.get_outputs()} == {"logits"} | outputs
    shape = inputs["past_key_values.0.key"]
    assert shape[1::2] == [decoder["num_key_value_heads"], decoder["head_size"]] == [2, 32]
    assert (config["type"], config["vocab_size"], config["context_length"]) == ("qwen3", 512, 256)
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 0)
    assert "bos_token_id" not in config


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        TinyModel("llama", linears("INT4_G32")).write(tmp_path / name)
        found.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert found[0] == found[1]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "genai_config.json",
        "model.onnx",
        "model.onnx_data",
    ]


def test_large_tensors_start_at_pages(tmp_path: Path) -> None:
    path = TinyModel("llama", linears("F32", "F32", "F32")).write(tmp_path)
    proto = onnx.load(str(path), load_external_data=False)
    offsets = {}
    for tensor in proto.graph.initializer:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        if int(fields.get("length", 0)) > 1 << 16:
            offsets[tensor.name] = int(fields.get("offset", 0))
    assert offsets.keys() == {EMBEDDING} | {HEAD}
    assert all(offset % 4096 == 0 for offset in offsets.values())
