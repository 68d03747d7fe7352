"""The traps of ONNX and ONNX Runtime that shaped the files: each as it is in the installed version,
and that our files keep clear of it. Where a trap fails to spring, the runtime has been mended and a
restriction can go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from exporters.onnx.decoder import IR_VERSIONS
from tests.onnx_models import EMBEDDING, HEAD, TinyModel, random_ids, run, session

INPUTS, OUTPUTS, GROUP = 64, 12, 32
FLOAT = TensorProto.FLOAT

EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}


def node(kind: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def dequantized(codes: str = "w", scale: str = "s", **attributes: Any) -> NodeProto:
    settings = {"axis": 0, "block_size": GROUP, **attributes}
    return node("DequantizeLinear", f"{codes} {scale}", "v", **settings)


MATMUL = node("MatMul", "x v", "y")


class Product:
    """A small product with a quantized weight [inputs, outputs]."""

    def __init__(self, bits: int = 4, outputs: int = OUTPUTS, group: int = GROUP) -> None:
        rng = np.random.default_rng(0)
        inputs = max(INPUTS, group)
        self.group = group
        half = 1 << (bits - 1)
        self.codes = rng.integers(-half, half, (inputs, outputs)).astype(np.int8)
        self.scales = rng.uniform(0.5, 1, (inputs // group, outputs)).astype(np.float16)
        self.x = rng.standard_normal((3, inputs)).astype(np.float32)
        weight = self.codes * np.repeat(self.scales.astype(np.float64), group, axis=0)
        self.wanted = self.x.astype(np.float64) @ weight
        packed = self.codes.astype({2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}[bits])
        self.tensors = {
            "w": packed,
            "s": self.scales.astype(np.float32),
            "half": self.scales,
            "turned": np.ascontiguousarray(packed.T),
            "bytes": self.codes,
        }

    def proto(self, *nodes: NodeProto, opset: int = 25, ir_version: int = 13) -> onnx.ModelProto:
        read = {name for one in nodes for name in one.input}
        held = [
            numpy_helper.from_array(array, name)
            for name, array in self.tensors.items()
            if name in read
        ]
        x = helper.make_tensor_value_info("x", FLOAT, [None, len(self.codes)])
        y = helper.make_tensor_value_info("y", FLOAT, [None, None])
        graph = helper.make_graph(list(nodes), "g", [x], [y], held)
        imports = [helper.make_opsetid("", opset)]
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)

    def error(self, *nodes: NodeProto, level: Any = None) -> float:
        """Largest error, relative to the largest product."""
        options = ort.SessionOptions()
        options.log_severity_level = 4
        for key, value in EXACT.items():
            options.add_session_config_entry(key, value)
        if level is not None:
            options.graph_optimization_level = level
        model = self.proto(*nodes).SerializeToString()
        runtime = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found = runtime.run(None, {"x": self.x})[0]
        return float(np.abs(found - self.wanted).max() / np.abs(self.wanted).max())

    def kinds(self, folder: Path, *nodes: NodeProto) -> list[str]:
        """Operators after the runtime's optimizations."""
        path = folder / "model.onnx"
        onnx.save(self.proto(*nodes), str(path))
        session(path, EXACT, folder / "optimized.onnx")
        return [one.op_type for one in onnx.load(str(folder / "optimized.onnx")).graph.node]


@pytest.fixture(params=["INT4_G32", "INT3_G32", "INT2_G32", "UINT4_G16", "FP4_G32", "FP8_G32"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> onnx.ModelProto:
    """A model whose tied table has the type of its linears, or 4 bits where that cannot be."""
    kind = request.param
    table = "INT4_G32" if kind.startswith("FP8") else kind
    model = TinyModel(
        "llama", lambda n: table if n == EMBEDDING else kind, tie_word_embeddings=True
    )
    return onnx.load(str(model.write(tmp_path)))


def test_a_file_stamped_newer_than_the_runtime_is_refused(written: onnx.ModelProto) -> None:
    """onnx stamps its newest version unasked, which runtimes learn of later; ours is older."""
    product = Product()
    proto = product.proto(dequantized(), MATMUL, ir_version=99)
    with pytest.raises(Exception, match="IR version"):
        ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    opset = next(entry.version for entry in written.opset_import if not entry.domain)
    assert written.ir_version == IR_VERSIONS[opset] < onnx.IR_VERSION


def test_fp16_scales_with_float_outputs_cannot_be_optimized() -> None:
    product = Product()
    nodes = dequantized(scale="half", output_dtype=FLOAT), MATMUL
    onnx.checker.check_model(product.proto(*nodes), full_check=True)
    assert product.error(*nodes, level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL) < 1e-5
    with pytest.raises(Exception, match="bound to different types"):
        product.error(*nodes)


def test_our_scales_are_cast_before_they_are_used(written: onnx.ModelProto) -> None:
    by_output = {one.output[0]: one for one in written.graph.node}
    used = [one for one in written.graph.node if one.op_type == "DequantizeLinear"]
    assert len(used) == 15
    for one in used:
        assert {attribute.name for attribute in one.attribute} == {"axis", "block_size"}
        assert by_output[one.input[1]].op_type == "Cast"


@pytest.mark.parametrize("kind", ["cast", "transpose"])
def test_integers_of_2_bits_cannot_be_folded(kind: str) -> None:
    product = Product(bits=2)
    before = (
        node("Cast", "bytes", "u", to=TensorProto.INT2)
        if kind == "cast"
        else node("Transpose", "turned", "u", perm=[1, 0])
    )
    nodes = before, dequantized("u"), MATMUL
    assert product.error(*nodes, level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL) < 1e-5
    with pytest.raises(Exception, match="Element type mismatch"):
        product.error(*nodes)
    assert product.error(node("Cast", "bytes", "u", to=TensorProto.INT4), *nodes[1:]) < 1e-5


def test_our_integers_of_2_bits_are_used_as_they_are(written: onnx.ModelProto) -> None:
    narrow = {t.name for t in written.graph.initializer if t.data_type == TensorProto.INT2}
    for one in written.graph.node:
        if narrow & set(one.input):
            assert one.op_type == "DequantizeLinear"
        to = {attribute.i for attribute in one.attribute if attribute.name == "to"}
        assert not to & {TensorProto.INT2, TensorProto.UINT2}


@pytest.mark.parametrize(("outputs", "wrong"), [(12, False), (10, True), (11, True)])
def test_2_bits_and_outputs_that_4_does_not_divide_are_computed_wrongly(
    outputs: int, wrong: bool
) -> None:
    product = Product(bits=2, outputs=outputs)
    assert (product.error(dequantized(), MATMUL) > 0.05) == wrong
    unfused = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert product.error(dequantized(), MATMUL, level=unfused) < 1e-5


@pytest.mark.parametrize(
    ("group", "fused"), [(8, False), (16, True), (32, True), (256, True), (512, True)]
)
def test_groups_that_are_fused(group: int, fused: bool, tmp_path: Path) -> None:
    """512 is right in this release alone: garbage before 1.29, an error in 1.29, unfused in 1.31.
    We refuse it as long as those are allowed."""
    product = Product(group=group)
    nodes = dequantized(block_size=group), MATMUL
    assert product.error(*nodes) < 1e-5
    assert ("MatMulNBits" in product.kinds(tmp_path, *nodes)) == fused


def test_a_weight_that_is_used_twice_is_not_fused(tmp_path: Path) -> None:
    product = Product()
    both = node("MatMul", "x v", "a"), node("MatMul", "x v", "b"), node("Add", "a b", "y")
    assert "MatMulNBits" not in product.kinds(tmp_path, dequantized(), *both)


def test_our_weights_are_used_once(written: onnx.ModelProto) -> None:
    used = [name for one in written.graph.node for name in one.input]
    products = [one for one in written.graph.node if one.op_type == "DequantizeLinear"]
    assert all(used.count(one.output[0]) == 1 for one in products)


def test_rows_that_are_turned_after_they_are_dequantized_are_not_fused(tmp_path: Path) -> None:
    product = Product()
    product.tensors["turned_scales"] = np.ascontiguousarray(product.tensors["s"].T)
    late = (
        node("DequantizeLinear", "turned turned_scales", "u", axis=1, block_size=GROUP),
        node("Transpose", "u", "v", perm=[1, 0]),
    )
    early = node("Transpose", "turned", "u", perm=[1, 0]), dequantized("u")
    assert product.error(*late, MATMUL) < 1e-5
    assert "MatMulNBits" not in product.kinds(tmp_path, *late, MATMUL)
    assert product.kinds(tmp_path, *early, MATMUL) == ["MatMulNBits"]


def test_narrow_integers_cannot_be_gathered() -> None:
    product = Product()
    product.tensors["ids"] = np.zeros(3, np.int64)
    gather = node("Gather", "w ids", "g")
    proto = product.proto(gather, node("Cast", "g", "y", to=FLOAT))
    with pytest.raises(onnx.shape_inference.InferenceError, match="unsupported type"):
        onnx.checker.check_model(proto, full_check=True)


def test_our_rows_are_gathered_before_they_are_made_floats(written: onnx.ModelProto) -> None:
    """A DequantizeLinear before the Gather would expand the table for every token."""
    gathers = [one for one in written.graph.node if "input_ids" in one.input]
    stored = {tensor.name for tensor in written.graph.initializer}
    kinds = {one.op_type for one in gathers}
    assert kinds == {"Gather", "Shape"}  # the latter for the mask
    assert {one.input[0] for one in gathers if one.op_type == "Gather"} <= stored


def test_there_are_no_integers_of_3_bits() -> None:
    assert not [name for name in TensorProto.DataType.keys() if name.endswith("INT3")]  # noqa: SIM118


@pytest.mark.parametrize("attention", ["standard", "primitive", "gqa"])
def test_the_operator_of_the_runtime_alone_ignores_padding_on_the_left(
    attention: str, tmp_path: Path
) -> None:
    """It takes lengths from the sum of the mask: other tokens, and no error. README warns."""
    model = TinyModel("llama", lambda n: "F16" if n in (EMBEDDING, HEAD) else "INT4_G32")
    runtime = session(model.write(tmp_path, attention=attention))
    ids, mask = random_ids(2, 12), np.ones((2, 12), np.int64)
    mask[1, :5] = 0
    found, _ = run(runtime, ids, mask)
    wanted = model.logits(ids, mask)
    real = mask.astype(bool)
    assert np.abs(found[0] - wanted[0]).max() < 2e-5
    differs = np.abs(found - wanted)[1][real[1]].max()
    assert differs < 2e-5 if attention != "gqa" else differs > 1e-2


def test_the_operator_of_the_runtime_continues_one_text_at_a_time(tmp_path: Path) -> None:
    """Several tokens of several texts on a cache: an error, so that nobody gets other tokens."""
    runtime = session(TinyModel("llama").write(tmp_path, attention="gqa"))
    ids = random_ids(2, 12)
    _, past = run(runtime, ids[:, :6])
    with pytest.raises(Exception, match="batch_size must be 1"):
        run(runtime, ids[:, 6:], np.ones((2, 12), np.int64), past)


def test_a_graph_beside_its_weights_stays_far_below_the_limit_of_protobuf(tmp_path: Path) -> None:
    """2 GB is the most that one message holds: no weight of any size may be in it."""
    path = TinyModel("llama", lambda n: "INT4_G32").write(tmp_path)
    proto = onnx.load(str(path), load_external_data=False)
    inside = [len(t.raw_data) for t in proto.graph.initializer if not t.external_data]
    assert max(inside) <= 1024
    assert path.stat().st_size < 1 << 17
