"""Floating-point weights in ONNX: E2M1 by a table, E8M0 scales by a table, E4M3 as it is."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from exporters.onnx import integer_weight, read_onnx
from exporters.onnx.entries import WeightEntry
from exporters.onnx.integers import (
    bit_patterns,
    canonical,
    places,
    quantized_tensor,
    scale_values,
    storage_of,
    stored_bytes,
)
from exporters.onnx.table import check_table
from pipeline.errors import InputError, UnsupportedError, VerificationError
from pipeline.quantization.formats import E2M1_LEVELS, E4M3_LEVELS, QuantizedTensor, get_format
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
NARROW = ("FP4_G16", "FP4_G32", "FP4_G64", "MXFP4")
KINDS = (*NARROW, "FP8_G16", "FP8_G32", "FP8_G64")


def model_of(kind: str, table: str = "F16", head: str = "INT4_G16", **options: bool) -> TinyModel:
    types = {EMBEDDING: table, HEAD: head}
    tied = options.get("tied", False)
    return TinyModel("qwen2", lambda name: types.get(name, kind), tie_word_embeddings=tied)


def test_levels_are_those_of_the_types() -> None:
    """Against every bit pattern of another library's types."""
    for levels, numpy, patterns, factor in (
        (E2M1_LEVELS, ml_dtypes.float4_e2m1fn, 16, 2),
        (E4M3_LEVELS, ml_dtypes.float8_e4m3fn, 256, 1),
    ):
        values = np.arange(patterns, dtype=np.uint8).view(numpy).astype(np.float64) * factor
        assert sorted(set(values[np.isfinite(values)].tolist())) == list(levels)


@pytest.mark.parametrize(
    ("bits", "numpy", "factor"), [(4, ml_dtypes.float4_e2m1fn, 2), (8, ml_dtypes.float8_e4m3fn, 1)]
)
def test_bit_patterns_are_those_of_the_types(bits: int, numpy: type, factor: int) -> None:
    levels = np.array({4: E2M1_LEVELS, 8: E4M3_LEVELS}[bits])
    every = np.arange(len(levels)) - len(levels) // 2
    patterns = bit_patterns(every.astype(np.int8), bits)
    assert np.array_equal(patterns.view(numpy).astype(np.float64) * factor, levels)
    assert np.array_equal(places(patterns, bits), every)
    wrong = [0x8] if bits == 4 else [0x80, 0x7F, 0xFF]
    for pattern in wrong:
        with pytest.raises(VerificationError, match="negative zero or not a number"):
            places(np.array([[1, pattern]], np.uint8), bits)


def test_exponents_are_those_of_the_type() -> None:
    every = np.arange(255, dtype=np.uint8)
    wanted = every.view(ml_dtypes.float8_e8m0fnu).astype(np.float64) / 2
    assert np.array_equal(scale_values(every).astype(np.float64), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["standard", "primitive"])
def test_what_runs_is_what_was_solved(kind: str, attention: str, tmp_path: Path) -> None:
    model = model_of(kind)
    path, ids = model.write(tmp_path, attention=attention), random_ids(2, 20)
    onnx.checker.check_model(str(path), full_check=True)
    wanted = model.logits(ids)
    assert np.abs(run(session(path), ids)[0] - wanted).max() < 2e-5
    left = census(path, tmp_path)
    expanded = LINEARS if kind.startswith("FP8") else 0
    assert left["MatMulNBits"] == LINEARS + 1 - expanded
    assert left["DequantizeLinear"] == expanded
    assert left["unfused linear"] == left["BitShift"] == 0
    if expanded:  # in floats in both modes: the default rounds inputs of the head alone
        return
    default = np.abs(run(session(path, {}), ids)[0] - wanted).max()
    assert 1e-3 < default < 1


@pytest.mark.parametrize("kind", ["FP8_G32", "FP4_G32"])
def test_an_option_expands_weights_once(kind: str, tmp_path: Path) -> None:
    """What README advises for FP8: floats after loading, nothing left to do in a call."""
    model, option = model_of(kind), {"session.disable_quant_qdq": "1"}
    path, ids = model.write(tmp_path), random_ids(1, 20)
    left = census(path, tmp_path, option)
    assert left["unfused linear"] == LINEARS + 1
    assert left["MatMulNBits"] == left["DequantizeLinear"] == 0
    assert np.abs(run(session(path, option), ids)[0] - model.logits(ids)).max() < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_exact(kind: str, tmp_path: Path) -> None:
    """One product against float64, with weights decoded by another library."""
    model = model_of(kind)
    proto = onnx.load(str(model.write(tmp_path)))
    tensors = {t.name: t for t in proto.graph.initializer}
    codes = numpy_helper.to_array(tensors[f"{LINEAR}_quantized"])
    scales = numpy_helper.to_array(tensors[f"{LINEAR}_scale"])
    if kind == "MXFP4":
        scales = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    elif kind.startswith("FP4"):
        scales = scales.astype(np.float64) * 2
    if not kind.startswith("FP8"):
        codes = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    group = len(codes) // len(scales)
    weight = codes.astype(np.float64) * np.repeat(scales.astype(np.float64), group, axis=0)
    assert np.array_equal(weight.T, model.solved[LINEAR].dequantize().double().numpy())
    product = f"{LINEAR.removesuffix('.weight')}.MatMul"
    found = next(node for node in proto.graph.node if node.name == product)
    proto = onnx.shape_inference.infer_shapes(proto)
    part = onnx.utils.Extractor(proto).extract_model([found.input[0]], [found.output[0]])
    x = np.random.default_rng(0).standard_normal((1, 5, len(codes))).astype(np.float32)
    wanted = x.astype(np.float64) @ weight
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    runtime = ort.InferenceSession(
        part.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {found.input[0]: x}
    for product in (runtime.run(None, feeds)[0], ReferenceEvaluator(part).run(None, feeds)[0]):
        assert np.linalg.norm(product - wanted) < 1e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("tied", [False, True])
def test_tables(kind: str, tied: bool, tmp_path: Path) -> None:
    model = model_of("INT4_G32", kind, tied=tied)
    path, _ = fused_as_solved(model, tmp_path)
    assert bytes_of(path, EMBEDDING) == stored_bytes(get_format(kind), (512, 64), EMBEDDING)
    back = read_onnx(path).quantized(EMBEDDING)
    assert torch.equal(back.codes, model.solved[EMBEDDING].codes)
    assert torch.equal(back.scales["d"], model.solved[EMBEDDING].scales["d"])


def test_a_table_that_cannot_be_gathered() -> None:
    entry = WeightEntry(EMBEDDING, "FP8_G32", (512, 64), lambda: np.zeros(0, np.float32))
    with pytest.raises(UnsupportedError, match="token embedding in FP8_G32"):
        check_table(entry)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_back_all_its_tensors(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    file = read_onnx(model.write(tmp_path))
    for name, solved in model.solved.items():
        back = file.quantized(name)
        assert back.format == solved.format
        assert torch.equal(back.codes, solved.codes)
        assert torch.equal(back.scales["d"], solved.scales["d"])
    held = [t for t in onnx.load(str(file.path)).graph.initializer if t.name.startswith(LINEAR)]
    assert sum(len(t.raw_data) for t in held) == stored_bytes(get_format(kind), (64, 128), LINEAR)


@pytest.mark.parametrize("value", [0.0, 2.0**-128, 2.0**-10, 1.0, 2.0**120])
def test_every_power_of_two_is_stored_exactly(value: float) -> None:
    solved = rounded(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), "MXFP4")
    solved.scales["d"][1] = value
    stored = integer_weight(solved)
    assert np.array_equal(stored.dequantize(), solved.dequantize().numpy())
    back = quantized_tensor(stored, solved.format)
    assert torch.equal(back.scales["d"], solved.scales["d"])
    assert torch.equal(back.dequantize(), solved.dequantize())
    assert torch.equal(back.codes, canonical(solved).codes)
    assert torch.equal(back.codes, solved.codes) == (value != 0)


@pytest.mark.parametrize("value", [3.0, -1.0, float("inf"), float("nan"), 2.0**-129])
def test_a_scale_that_is_no_power_of_two(value: float) -> None:
    solved = rounded(torch.ones(4, 64), "MXFP4")
    solved.scales["d"][1, 0] = value
    with pytest.raises(VerificationError, match="a scale of w is not"):
        integer_weight(solved, "w")


def test_codes_outside_the_format() -> None:
    for kind, code in (("FP4_G32", 8), ("FP4_G32", -8), ("FP8_G32", 127), ("MXFP4", 15)):
        fmt, codes = get_format(kind), torch.zeros(4, 64, dtype=torch.int8)
        codes[1, 1] = code
        with pytest.raises(VerificationError, match="a code of w"):
            integer_weight(QuantizedTensor(fmt, codes, {"d": torch.ones(4, 2)}), "w")


@pytest.mark.parametrize(
    ("kind", "shape", "why"),
    [
        ("FP4_G8", (64, 64), "groups of 8"),
        ("FP8_G512", (64, 512), "groups of 512"),
        ("FP4_G32", (64, 80), "do not divide"),
    ],
)
def test_groups_that_are_not_fused(kind: str, shape: tuple[int, int], why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        storage_of(get_format(kind), shape)


@pytest.mark.parametrize(
    ("kind", "pattern"), [("FP4_G32", 0x8), ("MXFP4", 0x8), ("FP8_G32", 0x80), ("FP8_G32", 0x7F)]
)
def test_patterns_that_the_formats_leave_out(kind: str, pattern: int, tmp_path: Path) -> None:
    path = model_of(kind).write(tmp_path)
    proto = onnx.load(str(path))
    tensor = next(t for t in proto.graph.initializer if t.name == f"{LINEAR}_quantized")
    raw = bytearray(tensor.raw_data)
    raw[0] = pattern
    tensor.raw_data = bytes(raw)
    onnx.save(proto, str(path))
    with pytest.raises(InputError, match=f"not the {kind} announced"):
        read_onnx(path).quantized(LINEAR)


E2M1, E8M0 = TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E8M0


def folded_model(node: onnx.NodeProto, *tensors: tuple[str, int, list[int], bytes]) -> bytes:
    held = [helper.make_tensor(*tensor, raw=True) for tensor in tensors]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 32])
    graph = helper.make_graph([node], "g", [], [y], held)
    imports = [helper.make_opsetid("", 25)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=13)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


@pytest.mark.parametrize("lack", ["dequantized E2M1", "cast E2M1", "E8M0 scales"])
def test_what_the_runtime_lacks(lack: str) -> None:
    """Why tables stand for E2M1 and E8M0. When this fails the runtime has learned it: then the
    types themselves can be written, see `exporters.onnx.integers`."""
    weight = ("w", TensorProto.INT4 if lack == "E8M0 scales" else E2M1, [2, 32], bytes(32))
    scale = ("s", TensorProto.FLOAT, [2, 1], np.ones(2, np.float32).tobytes())
    if lack == "E8M0 scales":
        scale = ("s", E8M0, [2, 1], bytes([127, 127]))
    attributes = {"axis": 1, "block_size": 32, "output_dtype": TensorProto.FLOAT}
    if lack == "cast E2M1":
        node = helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)
        model = folded_model(node, weight)
    else:
        node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], **attributes)
        model = folded_model(node, weight, scale)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        ort.InferenceSession(model, providers=["CPUExecutionProvider"])
