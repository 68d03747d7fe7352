"""What cannot be written, read, or must not be: each with an error that says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters.onnx import IntegerWeight, Rotary, integer_weight, read_onnx, storage_of
from exporters.onnx.integers import quantized_tensor
from pipeline.errors import (
    InputError,
    PipelineError,
    ResourceError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from pipeline.quantization.formats import GGML_FORMATS, QuantizedTensor, get_format
from tests.onnx_models import EMBEDDING, HEAD, TinyModel, rounded

NORM = "model.norm.weight"
LINEAR = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("kind", "shape", "why"),
    [
        ("INT4_G512", (64, 1024), "groups of 512"),
        ("INT4_G8", (64, 64), "groups of 8"),
        ("INT4_G48", (64, 96), "groups of 48"),
        ("INT4", (64, 1024), "groups of 1024"),
        ("INT4", (64, 128), "groups of 128"),
        ("INT2_G16", (64, 64), "groups of 16 .* at 2 bits"),
        ("INT2_G256", (64, 256), "groups of 256 .* at 2 bits"),
        ("INT4_G32", (64, 80), "do not divide"),
        ("INT2_G32", (62, 64), "62 outputs"),
        ("Q2_0", (510, 64), "510 outputs"),
        ("INT4_G32", (64,), "not a matrix"),
        ("INT5_G32", (64, 64), "cannot be stored"),
        ("INT7_G32", (64, 64), "cannot be stored"),
        ("Q4_1", (64, 64), "cannot be stored"),
        ("Q5_0", (64, 64), "cannot be stored"),
        ("IQ4_NL", (64, 64), "cannot be stored"),
        ("IQ2_XS", (64, 256), "cannot be stored"),
        ("Q2_K", (64, 256), "cannot be stored"),
        ("Q3_K", (64, 256), "cannot be stored"),
        ("Q6_K", (64, 256), "cannot be stored"),
    ],
)
def test_formats_that_the_runtime_does_not_compute_fast_and_right(
    kind: str, shape: tuple[int, ...], why: str
) -> None:
    with pytest.raises(UnsupportedError, match=why):
        storage_of(get_format(kind), shape)


def test_of_the_types_of_ggml_only_these_are_stored() -> None:
    def accepted(name: str) -> bool:
        try:
            storage_of(GGML_FORMATS[name], (64, 256))
        except UnsupportedError:
            return False
        return True

    assert {name for name in GGML_FORMATS if accepted(name)} == {"Q2_0", "Q4_0", "Q8_0", "MXFP4"}


def solved(kind: str = "INT4_G32") -> QuantizedTensor:
    return rounded(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), kind)


@pytest.mark.parametrize("value", [1e5, float("inf"), float("nan"), 1 / 3, 2.0**-25])
def test_a_scale_beside_the_lattice(value: float) -> None:
    weight = solved()
    weight.scales["d"][3, 1] = value
    with pytest.raises(VerificationError, match="a scale of w"):
        integer_weight(weight, "w")


@pytest.mark.parametrize(("kind", "code"), [("INT3_G32", 4), ("INT3_G32", -5), ("Q2_0", -2)])
def test_a_code_outside_the_format(kind: str, code: int) -> None:
    fmt, codes = get_format(kind), torch.zeros(8, 64, dtype=torch.int8)
    codes[2, 2] = code
    weight = QuantizedTensor(fmt, codes, {"d": torch.ones(8, 64 // fmt.group_size)})
    with pytest.raises(VerificationError, match="a code of w"):
        integer_weight(weight, "w")


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 8},
        {"group": 64},
        {"scales": np.ones((8, 1), np.float16)},
        {"codes": np.full((8, 64), 5, np.int8)},
    ],
)
def test_integers_of_another_format(change: dict[str, Any]) -> None:
    stored = dataclasses.replace(integer_weight(solved("INT3_G32")), **change)
    with pytest.raises(VerificationError):
        quantized_tensor(stored, get_format("INT3_G32"))


Change = Callable[[TinyModel], object]


def replace(name: str, /, **changes: Any) -> Change:
    def apply(model: TinyModel) -> None:
        model.entries = [
            dataclasses.replace(entry, **changes) if entry.name == name else entry
            for entry in model.entries
        ]

    return apply


def add(**changes: Any) -> Change:
    return lambda model: model.entries.append(dataclasses.replace(model.entries[0], **changes))


def drop(name: str) -> Change:
    return lambda model: setattr(
        model, "entries", [entry for entry in model.entries if entry.name != name]
    )


def configure(**changes: Any) -> Change:
    return lambda model: model.config.update(changes)


def rotate(*frequencies: float) -> Change:
    return lambda model: setattr(model, "rotary", Rotary(frequencies))


def infinite() -> np.ndarray:
    return np.full((64,), np.inf, np.float32)


def beyond_half() -> np.ndarray:
    return np.full((512, 64), 1e5, np.float32)


def narrow_groups() -> IntegerWeight:
    return integer_weight(rounded(torch.ones(64, 128), "INT4_G16"))


def few_scales() -> IntegerWeight:
    whole = integer_weight(rounded(torch.ones(64, 128), "INT4_G32"))
    return dataclasses.replace(whole, scales=whole.scales[:, :3])


REFUSED: dict[str, tuple[type[PipelineError], str, Change]] = {
    "no head": (InputError, "lm_head.weight is missing", drop(HEAD)),
    "no norm": (InputError, "model.norm.weight is missing", drop(NORM)),
    "no bias": (InputError, "q_proj.bias is missing", drop("model.layers.1.self_attn.q_proj.bias")),
    "odd tensor": (UnsupportedError, "no place for 'x'", add(name="x")),
    "twice": (InputError, "listed twice", add()),
    "shape": (InputError, r"is \(63,\), its config makes it", replace(NORM, shape=(63,))),
    "data shape": (
        VerificationError,
        "not the float32",
        replace(NORM, read=lambda: np.ones((63,), np.float32)),
    ),
    "data type": (VerificationError, "not the float32", replace(NORM, read=lambda: np.ones((64,)))),
    "floats for codes": (
        VerificationError,
        "not the INT4_G32 announced",
        replace(LINEAR, type="INT4_G32"),
    ),
    "other groups": (
        VerificationError,
        "not the INT4_G32 announced",
        replace(LINEAR, type="INT4_G32", read=narrow_groups),
    ),
    "few scales": (
        VerificationError,
        r"_scale is \(3, 64\), its entry announces \(4, 64\)",
        replace(LINEAR, type="INT4_G32", read=few_scales),
    ),
    "codes for floats": (VerificationError, "not the float32", replace(LINEAR, read=narrow_groups)),
    "infinite": (InputError, "not finite", replace(NORM, read=infinite)),
    "beyond fp16": (
        InputError,
        "not finite in F16",
        replace(EMBEDDING, type="F16", read=beyond_half),
    ),
    "norm in F16": (UnsupportedError, "norms and biases", replace(NORM, type="F16")),
    "quantized norm": (UnsupportedError, "norms and biases", replace(NORM, type="Q4_0")),
    "floats for rows": (
        VerificationError,
        "not the INT4_G32 announced",
        replace(EMBEDDING, type="INT4_G32"),
    ),
    "unknown type": (UnsupportedError, "unknown type", replace(LINEAR, type="INT9")),
    "group of 512": (UnsupportedError, "groups of", replace(LINEAR, type="INT4_G512")),
    "family": (UnsupportedError, "architecture 'gemma'", configure(model_type="gemma")),
    "activation": (UnsupportedError, "activation 'gelu'", configure(hidden_act="gelu")),
    "window": (UnsupportedError, "sliding", configure(use_sliding_window=True)),
    "layer types": (UnsupportedError, "sliding", configure(layer_types=["sliding_attention"])),
    "heads": (InputError, "do not divide", configure(num_key_value_heads=3)),
    "odd heads": (InputError, "form pairs", configure(head_dim=15)),
    "dynamic rope": (
        UnsupportedError,
        "RoPE type 'dynamic'",
        configure(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    ),
    "old longrope": (
        UnsupportedError,
        "RoPE type 'longrope'",
        configure(rope_scaling={"type": "longrope"}),
    ),
    "rope of transformers 5": (
        UnsupportedError,
        "RoPE type 'dynamic'",
        configure(rope_parameters={"rope_type": "dynamic"}),
    ),
    "rope is a list": (InputError, "must be an object", configure(rope_scaling=[1])),
    "partial rotary": (
        UnsupportedError,
        "partial_rotary_factor",
        configure(rope_parameters={"partial_rotary_factor": 0.5}),
    ),
    "partial rotary of transformers 4": (
        UnsupportedError,
        "partial_rotary_factor",
        configure(partial_rotary_factor=0.5),
    ),
    "few frequencies": (InputError, "7 rotary frequencies", rotate(*[1.0] * 7)),
    "wild frequencies": (InputError, "not finite", rotate(*[float("nan")] * 8)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_is_left(case: str, tmp_path: Path) -> None:
    kind, message, change = REFUSED[case]
    model = TinyModel("qwen2")
    change(model)
    with pytest.raises(kind, match=message) as caught:
        model.write(tmp_path)
    assert caught.value.exit_code == kind.exit_code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["author", "piso.tensor_types"])
def test_provenance_that_is_not_free(key: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="provenance key"):
        TinyModel().write(tmp_path, provenance={key: "x"})
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_model_as_it_was(tmp_path: Path) -> None:
    model = TinyModel()
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    model.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace(NORM, read=infinite)(model)
    with pytest.raises(InputError):
        model.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_new_model_replaces_the_old_one_and_what_a_killed_run_left(tmp_path: Path) -> None:
    TinyModel(seed=1).write(tmp_path)
    (tmp_path / ".model.onnx.partial").mkdir()
    (tmp_path / ".model.onnx.partial" / "model.onnx_data").write_bytes(b"half")
    model = TinyModel(seed=2)
    file = read_onnx(model.write(tmp_path))
    norm = dict(model.torch.named_parameters())[NORM].detach().numpy()
    assert np.array_equal(file.floats(NORM), norm)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="cannot write"):
        TinyModel().write(tmp_path / "missing")


def full_disk() -> np.ndarray:
    raise OSError(28, "No space left on device")


def test_a_full_disk(tmp_path: Path) -> None:
    model = TinyModel()
    replace(NORM, read=full_disk)(model)
    with pytest.raises(ResourceError, match="No space left"):
        model.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return TinyModel("llama", lambda n: "F16" if n in (EMBEDDING, HEAD) else "INT4_G32").write(
        tmp_path
    )


@pytest.mark.parametrize("content", [b"", b"\xff" * 100])
def test_not_our_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_onnx(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_onnx(tmp_path / "missing.onnx")


@pytest.mark.parametrize("types", ["", "[]", "{", '{"a": 1}'])
def test_metadata_of_something_else(types: str, written: Path) -> None:
    proto = onnx.load(str(written), load_external_data=False)
    next(e for e in proto.metadata_props if e.key == "piso.tensor_types").value = types
    onnx.save(proto, str(written))
    with pytest.raises(InputError, match="not written by this exporter"):
        read_onnx(written)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "other_data"])
def test_weights_in_another_file(location: str, written: Path) -> None:
    proto = onnx.load(str(written), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    written.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"not in model\.onnx_data"):
        read_onnx(written).quantized(LINEAR)


def test_weights_that_are_cut_off(written: Path) -> None:
    (written.parent / "model.onnx_data").write_bytes(b"\0" * 10)
    file = read_onnx(written)
    with pytest.raises(InputError, match="cannot be read"):
        file.quantized(LINEAR)
    (written.parent / "model.onnx_data").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        file.floats(EMBEDDING)


def test_asking_for_what_is_not_there(written: Path) -> None:
    file = read_onnx(written)
    for name in ("nothing", NORM, EMBEDDING):
        with pytest.raises(InputError, match="is not quantized"):
            file.quantized(name)
    for name in ("nothing", LINEAR):
        with pytest.raises(InputError, match="there are no floats"):
            file.floats(name)
    for kind in ("INT4_G16", "INT8_G32", "Q2_0", "Q3_K", "INT9"):
        lying = dataclasses.replace(file, types={LINEAR: kind})
        with pytest.raises(InputError, match=f"not the {kind} announced"):
            lying.quantized(LINEAR)
    with pytest.raises(InputError, match="is missing"):
        dataclasses.replace(file, types={"x": "Q4_0"}).quantized("x")


def test_floats_in_another_type_than_announced(written: Path) -> None:
    """The type is part of what a file promises, also where the values happen to be the same."""
    file = read_onnx(written)
    kind = file.types[NORM]
    other = "F16" if kind == "F32" else "F32"
    lying = dataclasses.replace(file, types={**file.types, NORM: other})
    with pytest.raises(InputError, match=f"{NORM} is float"):
        lying.floats(NORM)


@pytest.mark.parametrize("kind", [0, 99])
def test_tensors_of_no_known_type(kind: int, written: Path) -> None:
    proto = onnx.load(str(written), load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == NORM)
    tensor.data_type = kind
    written.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="cannot be read"):
        read_onnx(written).floats(NORM)


def test_metadata_that_nests_without_end(written: Path) -> None:
    proto = onnx.load(str(written), load_external_data=False)
    for entry in proto.metadata_props:
        entry.value = "[" * 100_000
    written.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="was not written by this exporter"):
        read_onnx(written)


@pytest.mark.parametrize("scale", [np.inf, np.nan, -1.0])
def test_scales_that_are_none_of_the_format(scale: float) -> None:
    fmt = get_format("UINT4_G16")
    codes, zeros = np.zeros((4, 16), np.int8), np.zeros((4, 1), np.int8)
    scales = np.full((4, 1), scale, np.float16)
    with pytest.raises(VerificationError, match="a scale of a matrix"):
        quantized_tensor(IntegerWeight(4, 16, codes, scales, zeros), fmt)
