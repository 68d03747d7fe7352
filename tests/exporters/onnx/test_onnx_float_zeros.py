"""Float zero points in ONNX: MatMulNBits in the file itself, exact in both modes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from exporters.onnx import integer_weight, read_onnx, storage_of
from exporters.onnx.integers import quantized_tensor, stored_bytes
from pipeline.errors import InputError, VerificationError
from pipeline.quantization.formats import QuantizedTensor, get_format, stored_pair
from tests.onnx_models import (
    EMBEDDING,
    HEAD,
    LINEARS,
    TinyModel,
    bytes_of,
    census,
    fused_as_solved,
    random_ids,
    rounded,
    run,
    session,
)

LINEAR = "model.layers.0.mlp.down_proj.weight"
KINDS = ("FINT4_G16", "FINT4_G32", "FINT4_G64", "FINT2_G32", "FINT2_G64")


def model_of(kind: str, table: str = "F16", *, tied: bool = False, rows: int = 512) -> TinyModel:
    types = {EMBEDDING: table, HEAD: "INT4_G16"}
    return TinyModel(
        "qwen2", lambda name: types.get(name, kind), tie_word_embeddings=tied, vocab_size=rows
    )


def product_alone(proto: onnx.ModelProto, name: str) -> tuple[onnx.ModelProto, str]:
    """The product with one weight, and the name of its input."""
    found = next(n for n in proto.graph.node if n.name.startswith(f"{name}.MatMul"))
    needed, stored = {found.name: found}, {t.name: t for t in proto.graph.initializer}
    by_output = {n.output[0]: n for n in proto.graph.node}
    for value in found.input[1:]:
        if value in by_output:
            needed[value] = by_output[value]
    held = {v for node in needed.values() for v in node.input if v in stored}
    x = helper.make_tensor_value_info(found.input[0], TensorProto.FLOAT, [None, None])
    y = helper.make_tensor_value_info(found.output[0], TensorProto.FLOAT, None)
    nodes = [n for n in proto.graph.node if n in needed.values()]
    graph = helper.make_graph(nodes, "g", [x], [y], [stored[v] for v in sorted(held)])
    imports = list(proto.opset_import)
    return helper.make_model(graph, opset_imports=imports, ir_version=10), found.input[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["standard", "primitive"])
def test_what_runs_is_what_was_solved(kind: str, attention: str, tmp_path: Path) -> None:
    model = model_of(kind)
    path, ids = model.write(tmp_path, attention=attention), random_ids(2, 20)
    onnx.checker.check_model(str(path), full_check=True)
    assert np.abs(run(session(path), ids)[0] - model.logits(ids)).max() < 2e-5
    left = census(path, tmp_path)
    assert left["MatMulNBits"] == LINEARS + 1
    assert left["DequantizeLinear"] == left["unfused linear"] == 0
    proto = onnx.load(str(path), load_external_data=False)
    assert sum(node.op_type == "MatMulNBits" for node in proto.graph.node) == LINEARS
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    assert versions == {"": 21 if attention == "primitive" else 23, "com.microsoft": 1}


@pytest.mark.parametrize("level", ["1", "4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_runtime_decodes_bit_for_bit(kind: str, level: str, tmp_path: Path) -> None:
    """Products with unit vectors are the runtime's own weights; random ones against float64."""
    model = model_of(kind)
    proto = onnx.load(str(model.write(tmp_path)))
    part, x = product_alone(proto, LINEAR.removesuffix(".weight"))
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    runtime = ort.InferenceSession(
        part.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    weight = model.solved[LINEAR].dequantize().numpy()
    units = np.eye(weight.shape[1], dtype=np.float32)
    assert np.array_equal(runtime.run(None, {x: units})[0].T, weight)
    for rows in (1, 40):
        inputs = np.random.default_rng(0).standard_normal((rows, weight.shape[1]))
        wanted = inputs @ weight.astype(np.float64).T
        found = runtime.run(None, {x: inputs.astype(np.float32)})[0]
        assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_tables(kind: str, tied: bool, tmp_path: Path) -> None:
    model = model_of("INT4_G32", kind, tied=tied)
    path, _ = fused_as_solved(model, tmp_path)
    assert bytes_of(path, EMBEDDING) == stored_bytes(get_format(kind), (512, 64), EMBEDDING)
    back, solved = read_onnx(path).quantized(EMBEDDING), model.solved[EMBEDDING]
    assert torch.equal(back.codes, solved.codes)
    assert all(torch.equal(back.scales[n], solved.scales[n]) for n in ("d", "m"))


def test_outputs_that_the_fusion_gets_wrong_in_2_bits(tmp_path: Path) -> None:
    """Its repacking is, not the operator: 510 outputs of a tied head."""
    model = model_of("INT4_G32", "FINT2_G32", tied=True, rows=510)
    path, ids = model.write(tmp_path), random_ids(1, 20) % 510
    assert np.abs(run(session(path), ids)[0] - model.logits(ids)).max() < 2e-5
    assert storage_of(get_format("FINT2_G32"), (510, 64)).float_zeros


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_back_all_its_tensors(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    file = read_onnx(model.write(tmp_path))
    for name, solved in model.solved.items():
        back = file.quantized(name)
        assert back.format == solved.format
        assert torch.equal(back.codes, solved.codes)
        assert all(torch.equal(back.scales[n], solved.scales[n]) for n in solved.scales)
    held = [t for t in onnx.load(str(file.path)).graph.initializer if t.name.startswith(LINEAR)]
    assert sum(len(t.raw_data) for t in held) == stored_bytes(get_format(kind), (64, 128), LINEAR)


def test_codes_lie_in_bytes_as_the_operator_wants_them(tmp_path: Path) -> None:
    model = model_of("FINT4_G32")
    proto = onnx.load(str(model.write(tmp_path)))
    tensor = next(t for t in proto.graph.initializer if t.name == f"{LINEAR}_quantized")
    blobs = numpy_helper.to_array(tensor)
    assert blobs.shape == (64, 4, 16)
    codes = model.solved[LINEAR].codes.numpy().reshape(64, 4, 32)
    assert np.array_equal(blobs & 15, codes[:, :, 0::2])
    assert np.array_equal(blobs >> 4, codes[:, :, 1::2])


def damaged(part: str, change: Any, folder: Path) -> Path:
    path = model_of("FINT4_G32").write(folder)
    proto = onnx.load(str(path))
    tensor = next(t for t in proto.graph.initializer if t.name == LINEAR + part)
    array = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    onnx.save(proto, str(path))
    return path


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("_quantized", lambda a: a[:, :, :-1]),
        ("_quantized", lambda a: a.astype(np.int8)),
        ("_zero_point", lambda a: a[:, :-1]),
        ("_zero_point", lambda a: a.astype(np.float32)),
        ("_zero_point", lambda a: a * 0 + np.float16(4096)),
        ("_zero_point", lambda a: a * 0 + np.float16(2.0**-14)),
        ("_zero_point", lambda a: a * np.float16("nan")),
        ("_scale", lambda a: a.astype(np.float32)),
    ],
)
def test_damaged_parts_are_noticed(part: str, change: Any, tmp_path: Path) -> None:
    path = damaged(part, change, tmp_path)
    with pytest.raises(InputError, match="not the FINT4_G32 announced"):
        read_onnx(path).quantized(LINEAR)


def test_an_offset_that_is_no_zero_point() -> None:
    solved = rounded(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), "FINT4_G32")
    back = quantized_tensor(integer_weight(solved), solved.format)
    assert all(torch.equal(back.scales[n], solved.scales[n]) for n in ("d", "m"))
    solved.scales["m"][1, 1] *= 1 + 2.0**-20
    with pytest.raises(VerificationError, match="an offset of w is no zero point"):
        integer_weight(solved, "w")


def test_extreme_pairs_come_back() -> None:
    fmt = get_format("FINT4_G32")
    d = torch.tensor([2.0**-24, 65504.0, 0.1, 0.0, 1e-5])
    m = torch.tensor([2.0**-14, -65504.0 * 15, 150.0, 0.0, -1e-5])
    d, m = stored_pair(fmt, d[:, None], m[:, None])
    codes = torch.arange(32, dtype=torch.int8).remainder(16).expand(5, 32)
    solved = QuantizedTensor(fmt, codes, {"d": d.half().float(), "m": m})
    stored = integer_weight(solved)
    assert np.array_equal(stored.dequantize(), solved.dequantize().numpy())
    back = quantized_tensor(stored, fmt)
    assert torch.equal(back.scales["m"], m)


def test_what_the_runtime_refuses_in_8_bits() -> None:
    """Why there is no FINT8. When this fails the runtime has learned it."""
    tensors = [
        numpy_helper.from_array(np.zeros((4, 1, 32), np.uint8), "b"),
        numpy_helper.from_array(np.ones((4, 1), np.float32), "s"),
        numpy_helper.from_array(np.full((4, 1), 0.5, np.float32), "z"),
    ]
    settings = {"K": 32, "N": 4, "bits": 8, "block_size": 32}
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s", "z"], ["y"], domain="com.microsoft", **settings
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([node], "g", [x], [y], tensors)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    with pytest.raises(Exception, match="8-bit weights with floating-point zero points"):
        ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
