"""3-bit codes in planes: a smaller file, and the same numbers, nodes and speed after loading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporters.onnx import read_onnx
from exporters.onnx.planes import join, split
from pipeline.errors import InputError
from tests.onnx_models import EMBEDDING, HEAD, TinyModel, census, random_ids, run, session

KINDS = ("INT3_G32", "INT3_G16", "UINT3_G32")
NAME = "model.layers.0.mlp.down_proj.weight"


def packed_model(kind: str, *, packed: bool = True) -> TinyModel:
    tables = {EMBEDDING: "F16", HEAD: "INT4_G32"}
    return TinyModel("qwen2", lambda name: tables.get(name, kind), packed=packed)


def test_bits_lie_where_they_should() -> None:
    """Against the binary digits of each code, one by one."""
    codes = np.random.default_rng(0).integers(0, 8, (24, 5)).astype(np.int8)
    low, high = split(codes)
    assert (low.shape, high.shape) == ((6, 5), (3, 5))
    for (row, column), code in np.ndenumerate(codes):
        digits = f"{code:03b}"
        two = low[row // 4, column] >> (2 * (row % 4)) & 3
        one = high[row // 8, column] >> (row % 8) & 1
        assert (f"{one:b}", f"{two:02b}") == (digits[0], digits[1:])
    assert np.array_equal(join(low, high), codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["standard", "primitive"])
def test_what_runs_is_what_was_solved(kind: str, attention: str, tmp_path: Path) -> None:
    model = packed_model(kind)
    path = model.write(tmp_path, attention=attention)
    onnx.checker.check_model(str(path), full_check=True)
    ids = random_ids(2, 20)
    assert np.abs(run(session(path), ids)[0] - model.logits(ids)).max() < 2e-5
    left = census(path, tmp_path)
    assert left["MatMulNBits"] == 15
    assert left["DequantizeLinear"] == left["unfused linear"] == left["BitShift"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_its_codes_back_and_is_smaller(kind: str, tmp_path: Path) -> None:
    sizes = {}
    for packed in (False, True):
        model = packed_model(kind, packed=packed)
        folder = tmp_path / str(packed)
        folder.mkdir()
        file = read_onnx(model.write(folder))
        for name, solved in model.solved.items():
            back = file.quantized(name)
            assert (back.codes == solved.codes).all()
            assert all((back.scales[n] == solved.scales[n]).all() for n in solved.scales)
        proto = onnx.load(str(folder / "model.onnx"))
        sizes[packed] = sum(
            len(t.raw_data) for t in proto.graph.initializer if t.name.startswith(f"{NAME}_quant")
        )
    assert sizes[True] == 64 * 128 * 3 // 8
    assert sizes[False] == 64 * 128 // 2


def test_planes_that_do_not_belong_together(tmp_path: Path) -> None:
    path = packed_model("INT3_G32").write(tmp_path)
    proto = onnx.load(str(path))
    high = next(t for t in proto.graph.initializer if t.name == f"{NAME}_quantized_high")
    high.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(high)[:-1], high.name))
    onnx.save(proto, str(path))
    with pytest.raises(InputError, match="planes of uint8"):
        read_onnx(path).quantized(NAME)
