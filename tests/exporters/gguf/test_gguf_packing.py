"""Packed bytes against two independent decoders: the C library and the gguf package."""

import ggml_oracle
import gguf
import numpy as np
import pytest
import torch

from exporters.gguf import ggml_type, pack
from pipeline.errors import UnsupportedError, VerificationError
from pipeline.quantization.formats import GGML_FORMATS, QuantizedTensor, get_format

TYPES = ("Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q6_K", "Q8_0")
IN_GGUF_PACKAGE = tuple(name for name in TYPES if name in gguf.GGMLQuantizationType.__members__)


def random_halves(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Every kind of finite fp16: both signs, zeros, subnormals, up to the largest."""
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    halves = bits.view(np.float16)
    halves = np.where(np.isfinite(halves), halves, np.float16(-65504))
    return torch.from_numpy(halves.astype(np.float32))


def random_tensor(name: str, rows: int = 7, blocks: int = 3, seed: int = 0) -> QuantizedTensor:
    fmt, rng = GGML_FORMATS[name], np.random.default_rng(seed)
    width = blocks * fmt.super_group
    codes = rng.integers(fmt.code_min, fmt.code_min + len(fmt.levels), (rows, width))
    scales = {"d": random_halves(rng, (rows, blocks))}
    if fmt.affine:
        scales["m"] = random_halves(rng, (rows, width // fmt.group_size))
    if fmt.sub_scale:
        low, high = fmt.sub_scale
        sub = rng.integers(low, high + 1, (rows, width // fmt.group_size))
        scales["sc"] = torch.from_numpy(sub.astype(np.int8))
    return QuantizedTensor(fmt, torch.from_numpy(codes.astype(np.int8)), scales)


def same_bits(found: np.ndarray, expected: torch.Tensor) -> bool:
    # Comparing values lets -0.0 equal 0.0: a zero weight has no sign that matters.
    return np.array_equal(found, expected.numpy())


@pytest.mark.parametrize("name", TYPES)
def test_the_c_library_decodes_what_the_solver_evaluated(name: str) -> None:
    tensor = random_tensor(name)
    decoded = ggml_oracle.dequantize(ggml_type(name).type_id, pack(tensor), tensor.codes.shape[1])
    assert same_bits(decoded, tensor.dequantize())


@pytest.mark.parametrize("name", IN_GGUF_PACKAGE)
def test_the_gguf_package_decodes_what_the_solver_evaluated(name: str) -> None:
    tensor = random_tensor(name, seed=1)
    decoded = gguf.quants.dequantize(pack(tensor), gguf.GGMLQuantizationType[name])
    assert same_bits(decoded, tensor.dequantize())


@pytest.mark.parametrize("name", TYPES)
def test_every_code_in_every_place(name: str) -> None:
    fmt = GGML_FORMATS[name]
    block, levels = fmt.super_group, len(fmt.levels)
    places = (np.arange(levels)[:, None] + np.arange(block)) % levels + fmt.code_min
    tensor = random_tensor(name, rows=levels, blocks=1)
    tensor = QuantizedTensor(fmt, torch.from_numpy(places.astype(np.int8)), tensor.scales)
    decoded = ggml_oracle.dequantize(ggml_type(name).type_id, pack(tensor), block)
    assert same_bits(decoded, tensor.dequantize())


@pytest.mark.parametrize("name", TYPES)
def test_bytes_of_the_c_quantizer_survive_decoding_and_repacking(name: str) -> None:
    fmt, rng = GGML_FORMATS[name], np.random.default_rng(2)
    weights = rng.standard_normal((5, 2 * fmt.super_group)).astype(np.float32)
    expected = ggml_oracle.quantize(ggml_type(name).type_id, weights)
    scales = stored_scales(name, expected.reshape(-1, ggml_type(name).nbytes))
    scales = {key: torch.from_numpy(value.reshape(5, -1)) for key, value in scales.items()}

    decoded = ggml_oracle.dequantize(ggml_type(name).type_id, expected, weights.shape[1])
    group = weights.shape[1] // (scales["sc"] if "sc" in scales else scales["d"]).shape[1]
    unit = QuantizedTensor(fmt, torch.zeros(decoded.shape, dtype=torch.int8), scales).group_scales()
    unit = np.repeat(unit.numpy(), group, axis=1)
    offset = np.repeat(scales["m"].numpy(), group, axis=1) if fmt.affine else 0
    with np.errstate(invalid="ignore", divide="ignore"):
        codes = np.nan_to_num(np.rint((decoded.astype(np.float64) - offset) / unit))
    tensor = QuantizedTensor(fmt, torch.from_numpy(codes.astype(np.int8)), scales)
    assert np.array_equal(pack(tensor), expected)


def stored_scales(name: str, blocks: np.ndarray) -> dict[str, np.ndarray]:
    """Scale fields where ggml-common.h says they are."""

    def half(at: int) -> np.ndarray:
        return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)

    if name == "Q6_K":
        return {"d": half(208), "sc": blocks[:, 192:208].copy().view(np.int8)}
    return {"d": half(0), "m": half(2)} if name == "Q4_1" else {"d": half(0)}


@pytest.mark.parametrize("name", TYPES)
def test_large_tensors_are_packed_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor(name, rows=9)
    whole = pack(tensor)
    monkeypatch.setattr("exporters.gguf.packing._WEIGHTS_AT_ONCE", 4 * tensor.codes.shape[1])
    assert np.array_equal(pack(tensor), whole)


@pytest.mark.parametrize("name", ["INT4_G32", "INT3"])
def test_formats_without_a_ggml_type(name: str) -> None:
    codes = torch.zeros(2, 64, dtype=torch.int8)
    tensor = QuantizedTensor(get_format(name), codes, {"d": torch.ones(2, 2)})
    with pytest.raises(UnsupportedError, match=name):
        pack(tensor)


def test_widths_that_are_no_whole_blocks() -> None:
    codes = torch.zeros(2, 48, dtype=torch.int8)
    with pytest.raises(UnsupportedError, match="48"):
        pack(QuantizedTensor(GGML_FORMATS["Q4_0"], codes, {"d": torch.ones(2, 1)}))


@pytest.mark.parametrize("value", [1e-9, 1 / 3, 65520.0, float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "field"), [("Q4_0", "d"), ("Q4_1", "m"), ("Q6_K", "d")])
def test_scales_off_the_lattice(name: str, field: str, value: float) -> None:
    tensor = random_tensor(name)
    tensor.scales[field][1, 1] = value
    with pytest.raises(VerificationError, match=field):
        pack(tensor)


@pytest.mark.parametrize("name", ["Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q6_K", "Q8_0"])
def test_codes_out_of_range(name: str) -> None:
    fmt = GGML_FORMATS[name]
    for code in (fmt.code_min - 1, fmt.code_min + len(fmt.levels)):
        tensor = random_tensor(name)
        if -128 <= code <= 127:
            tensor.codes[0, 5] = code
            with pytest.raises(VerificationError, match=r"codes"):
                pack(tensor)


def test_wrong_fields_and_dtypes() -> None:
    fmt = GGML_FORMATS["Q4_0"]
    codes = torch.zeros(2, 64, dtype=torch.int8)
    for scales in ({}, {"d": torch.ones(2, 1)}, {"d": torch.ones(2, 2), "m": torch.ones(2, 2)}):
        with pytest.raises(VerificationError, match="shapes"):
            pack(QuantizedTensor(fmt, codes, scales))
    with pytest.raises(VerificationError, match="int8"):
        pack(QuantizedTensor(fmt, codes.int(), {"d": torch.ones(2, 2)}))
    tensor = random_tensor("Q6_K")
    fields = {**tensor.scales, "sc": tensor.scales["sc"].float()}
    with pytest.raises(VerificationError, match="sub-scales"):
        pack(QuantizedTensor(tensor.format, tensor.codes, fields))
