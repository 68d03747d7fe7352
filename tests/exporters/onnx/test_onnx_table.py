"""Embeddings of 2 to 4 bits: packed rows, unpacked as they are gathered, and tied heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from exporters.onnx import integer_weight, read_onnx
from exporters.onnx.integers import stored_bytes
from exporters.onnx.packed import pack_rows, sign_extended, unpack_rows
from pipeline.errors import InputError
from pipeline.quantization.formats import get_format
from tests.onnx_models import (
    EMBEDDING,
    HEAD,
    TinyModel,
    fused_as_solved,
    random_ids,
    run,
    session,
)

NARROW = (
    *("INT4_G32", "INT4_G16", "Q4_0", "INT3_G32", "INT2_G32", "Q2_0"),
    *("UINT4_G16", "UINT4_G64", "UINT3_G32", "UINT2_G32", "UINT2_G64"),
)
"""UINT4_G64 has one zero point in a row of 64 and UINT2_G32 two: bytes that are not full."""

PLANES = ("INT3_G32", "UINT3_G32")


def model_of(
    table: str, *, tied: bool = True, family: str = "llama", packed: bool = False, rows: int = 512
) -> TinyModel:
    types = {EMBEDDING: table, HEAD: "INT4_G16"}
    return TinyModel(
        family,
        lambda name: types.get(name, "INT4_G32"),
        packed=packed,
        tie_word_embeddings=tied,
        vocab_size=rows,
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_bits_lie_where_they_should(bits: int, count: int) -> None:
    """Against the binary digits of each code, one by one."""
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, count)).astype(np.int8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    for (row, column), code in np.ndenumerate(codes):
        byte, place = divmod(column * bits, 8)
        digits = f"{packed[row, byte]:08b}"[::-1][place : place + bits][::-1]
        assert digits == f"{code:0{bits}b}"
    assert np.array_equal(unpack_rows(packed, bits, count), codes)
    signed = (codes - (1 << (bits - 1))).astype(np.int8)
    back = unpack_rows(pack_rows(signed, bits), bits, count)
    assert np.array_equal(sign_extended(back, bits), signed)


@pytest.mark.parametrize("kind", ["INT4_G32", "INT2_G32", "UINT4_G32", "UINT2_G32"])
def test_bytes_are_those_of_a_tensor_of_such_integers(kind: str, tmp_path: Path) -> None:
    """Against the packing of the library `onnx`: a type of whole bytes is all that differs."""
    model = model_of(kind)
    tensors = onnx.load(str(model.write(tmp_path))).graph.initializer
    found = next(t for t in tensors if t.name == f"{EMBEDDING}_quantized")
    bits = len(get_format(kind).levels).bit_length() - 1
    numpy = getattr(ml_dtypes, f"{'u' if kind.startswith('U') else ''}int{bits}")
    wanted = numpy_helper.from_array(model.solved[EMBEDDING].codes.numpy().astype(numpy))
    assert found.data_type == onnx.TensorProto.UINT8
    assert found.raw_data == wanted.raw_data


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("tied", [False, True])
def test_what_runs_is_what_was_solved(kind: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(kind, tied=tied)
    _, left = fused_as_solved(model, tmp_path)
    affine = kind.startswith("U")
    assert left["BitShift"] == 1 + affine  # of the gathered rows; the head's are folded


@pytest.mark.parametrize("kind", PLANES)
@pytest.mark.parametrize("tied", [False, True])
def test_three_bits_in_planes(kind: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(kind, tied=tied, packed=True)
    path, _ = fused_as_solved(model, tmp_path)
    back, solved = read_onnx(path).quantized(EMBEDDING), model.solved[EMBEDDING]
    assert torch.equal(back.codes, solved.codes)
    assert all(torch.equal(back.scales[n], solved.scales[n]) for n in solved.scales)


@pytest.mark.parametrize("kind", ["INT4_G32", "UINT2_G32", "UINT4_G64"])
def test_gathered_rows_are_exactly_the_stored_ones(kind: str, tmp_path: Path) -> None:
    """By the reference implementation of the standard, which shares nothing with the runtime."""
    model = model_of(kind, tied=False)
    proto = onnx.load(str(model.write(tmp_path, attention="primitive")))
    rows = next(n.output[0] for n in proto.graph.node if n.name == f"{EMBEDDING}.joined.Reshape")
    evaluator = ReferenceEvaluator(proto)
    ids = random_ids(2, 9)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids * 0}
    for value in proto.graph.input[3:]:
        shape = value.type.tensor_type.shape.dim
        feeds[value.name] = np.zeros((2, shape[1].dim_value, 0, shape[3].dim_value), np.float32)
    found = evaluator.run(None, feeds, intermediate=True)[rows]
    wanted = model.solved[EMBEDDING].dequantize().numpy()[ids]
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("kind", ["INT2_G32", "Q2_0"])
def test_a_vocabulary_that_the_runtime_could_not_compute_in_2_bits(
    kind: str, tmp_path: Path
) -> None:
    """Its 2-bit product is wrong unless 4 divides the outputs; the tied head has 4 bits."""
    model = model_of(kind, rows=510)
    path, ids = model.write(tmp_path), random_ids(1, 20) % 510
    assert np.abs(run(session(path), ids)[0] - model.logits(ids)).max() < 2e-5
    versions = {e.domain: e.version for e in onnx.load(str(path)).opset_import}
    assert versions[""] == 23  # nothing in the graph is an INT2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", NARROW)
def test_a_tied_table_is_stored_once_and_as_large_as_announced(
    kind: str, packed: bool, tmp_path: Path
) -> None:
    model = model_of(kind, packed=packed)
    proto = onnx.load(str(model.write(tmp_path)))
    held = [t for t in proto.graph.initializer if 512 in t.dims]
    assert all(t.name.startswith(EMBEDDING) for t in held)
    assert sum(len(t.raw_data) for t in held) == stored_bytes(
        get_format(kind), (512, 64), EMBEDDING, packed=packed
    )


@pytest.mark.parametrize("kind", NARROW)
def test_a_file_gives_its_rows_back(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tied=False)
    back, solved = read_onnx(model.write(tmp_path)).quantized(EMBEDDING), model.solved[EMBEDDING]
    assert back.format == solved.format
    assert torch.equal(back.codes, solved.codes)
    assert all(torch.equal(back.scales[n], solved.scales[n]) for n in solved.scales)
    assert np.array_equal(integer_weight(back).dequantize(), solved.dequantize().numpy())


DAMAGE: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "cut": lambda array: array[:, :-1],
    "fewer rows": lambda array: array[:-1],
    "no rows": lambda array: array[:0],
    "retyped": lambda array: array.astype(np.int16),
    "a number": lambda array: array.reshape(-1)[0],
    "a vector": lambda array: array.reshape(-1),
}


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *(("UINT4_G16", part) for part in ("_quantized", "_zero_point", "_scale")),
        *(("INT3_G16", part) for part in ("_quantized_low", "_quantized_high")),
        *(("FINT4_G16", part) for part in ("_quantized", "_zero_point")),
    ],
)
@pytest.mark.parametrize("change", DAMAGE)
def test_damaged_rows_are_noticed(kind: str, part: str, change: str, tmp_path: Path) -> None:
    path = model_of(kind, packed=kind == "INT3_G16").write(tmp_path)
    proto = onnx.load(str(path))
    tensor = next(t for t in proto.graph.initializer if t.name == EMBEDDING + part)
    array = DAMAGE[change](numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
    onnx.save(proto, str(path))
    with pytest.raises(InputError, match=f"not the {kind} announced"):
        read_onnx(path).quantized(EMBEDDING)
