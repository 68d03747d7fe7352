"""Packed bytes against two independent decoders: the C library and the gguf package."""

import itertools

import ggml_oracle
import gguf
import numpy as np
import pytest
import torch

from exporters.gguf import ggml_type, pack
from pipeline.errors import UnsupportedError, VerificationError
from pipeline.quantization.formats import E8M0, GGML_FORMATS, UE4M3, QuantizedTensor, get_format

TYPES = tuple(GGML_FORMATS)
CODEBOOKS = tuple(name for name, fmt in GGML_FORMATS.items() if fmt.codebook)
SCALAR = tuple(name for name in TYPES if name not in CODEBOOKS)
IN_GGUF_PACKAGE = tuple(name for name in TYPES if name in gguf.GGMLQuantizationType.__members__)


def random_halves(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Every kind of finite fp16: both signs, zeros, subnormals, up to the largest."""
    bits = rng.integers(0, 1 << 16, shape, np.uint16)
    halves = bits.view(np.float16)
    halves = np.where(np.isfinite(halves), halves, np.float16(-65504))
    return torch.from_numpy(halves.astype(np.float32))


def random_tensor(name: str, rows: int = 7, blocks: int = 3, seed: int = 0) -> QuantizedTensor:
    fmt, rng = GGML_FORMATS[name], np.random.default_rng(seed)
    width = blocks * fmt.stored_block(256)
    codes = rng.integers(fmt.code_min, fmt.code_min + len(fmt.levels), (rows, width))
    if fmt.codebook is not None:
        codes = random_vectors(rng, name, rows, width)
    per_super, per_group = (rows, width // fmt.super_group), (rows, width // fmt.group_size)

    def integers(limits: tuple[int, int]) -> torch.Tensor:
        found = rng.integers(limits[0], limits[1] + 1, per_group)
        found -= (found - limits[0]) % fmt.sub_step
        return torch.from_numpy(found.astype(np.int8))

    scales = {"d": random_halves(rng, per_super)}
    if fmt.scale_lattice is E8M0:
        exponents = torch.from_numpy(rng.integers(-128, 128, per_super))
        scales["d"] = torch.ldexp(torch.ones(per_super), exponents)
    if fmt.scale_lattice is UE4M3:
        numbers = torch.from_numpy(rng.integers(0, 0x7F, per_super, np.uint8))
        scales["d"] = numbers.view(torch.float8_e4m3fn).float() / 2
    if fmt.sub_scale:
        scales["sc"] = integers(fmt.sub_scale)
    if fmt.sub_offset:
        scales |= {"dmin": random_halves(rng, per_super), "mn": integers(fmt.sub_offset)}
    elif fmt.affine:
        scales["m"] = random_halves(rng, per_group)
    return QuantizedTensor(fmt, torch.from_numpy(codes.astype(np.int8)), scales)


def random_vectors(rng: np.random.Generator, name: str, rows: int, width: int) -> np.ndarray:
    """Codes of random entries with random signs, the eighth such that their number is even."""
    kind = getattr(gguf.quants, name)
    kind.init_grid()
    grid = kind.grid.reshape(kind.grid_shape)
    entries = rng.integers(0, len(grid), width * rows // grid.shape[1])
    magnitudes = np.searchsorted(np.unique(grid), grid[entries]).reshape(rows, width)
    negative = rng.integers(0, 2, (rows, width // 8, 8))
    negative[:, :, 7] = negative[:, :, :7].sum(2) % 2
    n = len(np.unique(grid))
    return np.where(negative.reshape(rows, width), n - 1 - magnitudes, n + magnitudes)


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


@pytest.mark.parametrize("name", SCALAR)
def test_every_code_in_every_place(name: str) -> None:
    fmt = GGML_FORMATS[name]
    block, levels = fmt.stored_block(256), len(fmt.levels)
    places = (np.arange(levels)[:, None] + np.arange(block)) % levels + fmt.code_min
    tensor = random_tensor(name, rows=levels, blocks=1)
    tensor = QuantizedTensor(fmt, torch.from_numpy(places.astype(np.int8)), tensor.scales)
    decoded = ggml_oracle.dequantize(ggml_type(name).type_id, pack(tensor), block)
    assert same_bits(decoded, tensor.dequantize())


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_entry_with_every_pattern_of_signs_in_turn(name: str) -> None:
    codebook = GGML_FORMATS[name].codebook
    entries, n = codebook.entries.numpy(), len(codebook.magnitudes)
    per_row = 256 // entries.shape[1]
    rows = max(len(entries) // per_row, 256 // 32)
    magnitudes = entries[np.arange(rows * per_row) % len(entries)].reshape(rows, 256)
    patterns = np.arange(rows * 32) % 256
    negative = patterns[:, None] >> np.arange(8) & 1
    if codebook.even:
        negative[:, 7] = negative[:, :7].sum(1) % 2
    negative = negative.reshape(rows, 256)
    codes = np.where(negative, n - 1 - magnitudes, n + magnitudes).astype(np.int8)
    scales = random_tensor(name, rows=rows, blocks=1).scales
    tensor = QuantizedTensor(GGML_FORMATS[name], torch.from_numpy(codes), scales)
    found = ggml_oracle.dequantize(ggml_type(name).type_id, pack(tensor), 256)
    assert same_bits(found, tensor.dequantize())
    unit = {"d": torch.ones(rows, 1), "sc": torch.ones(rows, 256 // tensor.format.group_size)}
    plain = QuantizedTensor(tensor.format, tensor.codes, {**unit, "sc": unit["sc"].to(torch.int8)})
    decoded = gguf.quants.dequantize(pack(plain), gguf.GGMLQuantizationType[name])
    kind = getattr(gguf.quants, name)
    grid = kind.grid.reshape(kind.grid_shape)[np.arange(rows * per_row) % len(entries)]
    unit_of = grid[0, 0] / np.abs(decoded).ravel()[0]
    np.testing.assert_array_equal(np.abs(decoded).ravel() * unit_of, grid.ravel())
    np.testing.assert_array_equal(decoded < 0, negative.astype(bool))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_vectors_that_the_codebook_does_not_have(name: str) -> None:
    codebook = GGML_FORMATS[name].codebook
    n, places = len(codebook.magnitudes), codebook.entries.shape[1]
    entries = {tuple(entry) for entry in codebook.entries.tolist()}
    missing = next(v for v in itertools.product(range(n), repeat=places) if v not in entries)
    tensor = random_tensor(name)
    tensor.codes[3, 8 : 8 + places] = torch.tensor(missing, dtype=torch.int8) + n
    tensor.codes[3, 8 + places : 16] = n + codebook.entries[0, 0].to(torch.int8)
    with pytest.raises(VerificationError, match="no such vector"):
        pack(tensor)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_odd_numbers_of_negative_weights(name: str) -> None:
    codebook = GGML_FORMATS[name].codebook
    tensor = random_tensor(name)
    tensor.codes[2, 40] = 2 * len(codebook.magnitudes) - 1 - tensor.codes[2, 40]
    if codebook.even:
        with pytest.raises(VerificationError, match="odd number"):
            pack(tensor)
    else:
        decoded = ggml_oracle.dequantize(ggml_type(name).type_id, pack(tensor), 768)
        assert same_bits(decoded, tensor.dequantize())


@pytest.mark.parametrize("name", CODEBOOKS)
def test_sub_scales_are_odd(name: str) -> None:
    for wrong in (0, 2, 33):
        tensor = random_tensor(name)
        tensor.scales["sc"][1, 1] = wrong
        with pytest.raises(VerificationError, match=r"1\.\.31 in steps of 2"):
            pack(tensor)


@pytest.mark.parametrize("name", TYPES)
def test_bytes_of_the_c_quantizer_survive_decoding_and_repacking(name: str) -> None:
    fmt, rng = GGML_FORMATS[name], np.random.default_rng(2)
    weights = rng.standard_normal((5, 2 * fmt.stored_block(256))).astype(np.float32)
    expected = ggml_oracle.quantize(ggml_type(name).type_id, weights)
    scales = stored_scales(name, expected.reshape(-1, ggml_type(name).nbytes))
    scales = {key: torch.from_numpy(value.reshape(5, -1)) for key, value in scales.items()}

    decoded = ggml_oracle.dequantize(ggml_type(name).type_id, expected, weights.shape[1])
    unit = QuantizedTensor(fmt, torch.zeros(decoded.shape, dtype=torch.int8), scales)
    scale, offset = unit.group_scales().numpy(), unit.group_offsets()
    scale = np.repeat(scale, fmt.group_size, axis=1)[:, :, None]
    offset = 0 if offset is None else np.repeat(offset.numpy(), fmt.group_size, axis=1)[:, :, None]
    values = scale * np.array(fmt.levels, np.float32) + offset
    # A group of scale 0 says nothing of its codes: the C quantizers store level 0, or the lowest.
    zero = fmt.levels.index(0) if 0 in fmt.levels else 0
    exact = np.abs(values.astype(np.float64) - decoded[:, :, None])
    codes = np.where(scale[:, :, 0] == 0, zero, exact.argmin(2)) + fmt.code_min
    tensor = QuantizedTensor(fmt, torch.from_numpy(codes.astype(np.int8)), scales)
    assert np.array_equal(pack(tensor), expected)


def stored_scales(name: str, blocks: np.ndarray) -> dict[str, np.ndarray]:
    """Scale fields where ggml-common.h says they are, bit after bit."""

    def half(at: int) -> np.ndarray:
        return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)

    def each(field) -> np.ndarray:
        return np.array([field(block.astype(int)) for block in blocks], np.int8)

    if name == "MXFP4":
        return {"d": np.ldexp(np.float32(1), blocks[:, :1].astype(int) - 128)}
    if name == "NVFP4":
        numbers = torch.from_numpy(blocks[:, :4].copy()).view(torch.float8_e4m3fn)
        return {"d": numbers.float().numpy() / 2}
    if name == "Q6_K":
        return {"d": half(208), "sc": blocks[:, 192:208].copy().view(np.int8)}
    if name == "Q2_K":
        sc, mn = each(lambda b: b[:16] % 16), each(lambda b: b[:16] // 16)
        return {"d": half(80), "dmin": half(82), "sc": sc, "mn": mn}
    if name == "Q3_K":
        sc = each(lambda b: [six_bits_of_q3(b[96:108], n) - 32 for n in range(16)])
        return {"d": half(108), "sc": sc}
    if name in ("Q4_K", "Q5_K"):
        sc, mn = (each(lambda b, at=at: pairs_of_q4(b[4:16], at)) for at in (0, 1))
        return {"d": half(0), "dmin": half(2), "sc": sc, "mn": mn}
    if name == "IQ4_XS":
        return {"d": half(0), "sc": each(scales_of_iq4)}
    if name in SUB_SCALE_NIBBLES:
        sc = each(
            lambda b: [2 * (b[at] >> shift & 15) + 1 for at, shift in SUB_SCALE_NIBBLES[name]]
        )
        return {"d": half(0), "sc": sc}
    at = {"TQ1_0": 52, "TQ2_0": 64}.get(name, 0)
    return {"d": half(at)} | ({"m": half(2)} if name in ("Q4_1", "Q5_1") else {})


SUB_SCALE_NIBBLES = {
    "IQ2_XXS": [(9 + 8 * n, 4) for n in range(8)],
    "IQ2_XS": [(66 + n // 2, 4 * (n % 2)) for n in range(16)],
    "IQ2_S": [(74 + n // 2, 4 * (n % 2)) for n in range(16)],
    "IQ3_XXS": [(69 + 4 * n, 4) for n in range(8)],
    "IQ3_S": [(106 + n // 2, 4 * (n % 2)) for n in range(8)],
}
"""Byte and bit of every sub-scale in its block."""


def six_bits_of_q3(packed: np.ndarray, n: int) -> int:
    low = packed[n] % 16 if n < 8 else packed[n - 8] // 16
    return int(low + 16 * (packed[8 + n % 4] >> 2 * (n // 4) & 3))


def pairs_of_q4(q: np.ndarray, offset: int) -> list[int]:
    """get_scale_min_k4 for all eight groups."""
    found = []
    for j in range(8):
        if j < 4:
            found.append(q[j + 4 * offset] & 63)
        else:
            low = q[j + 4] >> 4 if offset else q[j + 4] & 15
            found.append(low | (q[j - 4 + 4 * offset] >> 6) << 4)
    return found


def scales_of_iq4(block: np.ndarray) -> list[int]:
    high = block[2] | block[3] << 8
    return [
        (block[4 + n // 2] >> 4 * (n % 2) & 15 | (high >> 2 * n & 3) << 4) - 32 for n in range(8)
    ]


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
@pytest.mark.parametrize(
    ("name", "field"), [("Q4_0", "d"), ("Q4_1", "m"), ("Q6_K", "d"), ("Q4_K", "dmin")]
)
def test_scales_off_the_lattice(name: str, field: str, value: float) -> None:
    tensor = random_tensor(name)
    tensor.scales[field][1, 1] = value
    with pytest.raises(VerificationError, match=field):
        pack(tensor)


@pytest.mark.parametrize("name", TYPES)
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
    tensor = random_tensor("Q4_K")
    for field in ("sc", "mn"):
        wrong = [tensor.scales[field].float(), torch.full_like(tensor.scales[field], 64)]
        for value in wrong:
            fields = {**tensor.scales, field: value}
            with pytest.raises(VerificationError, match=rf"{field}.*0\.\.63"):
                pack(QuantizedTensor(tensor.format, tensor.codes, fields))


def test_powers_of_two_are_stored_as_their_exponents() -> None:
    fmt = GGML_FORMATS["MXFP4"]
    codes = torch.zeros(3, 32, dtype=torch.int8)
    scales = {"d": torch.tensor([[2.0**127], [2.0**-128], [0.0]])}
    packed = pack(QuantizedTensor(fmt, codes, scales))
    assert packed[:, 0].tolist() == [255, 0, 0]
    assert not packed[2].any()  # the exponent cannot say 0, so the codes must
    with pytest.raises(VerificationError, match="e8m0"):
        pack(QuantizedTensor(fmt, codes, {"d": torch.full((3, 1), 0.75)}))


@pytest.mark.parametrize("tensor_scale", [1.0, 2.0**-13, 2.0**5])
def test_every_scale_of_nvfp4_is_stored_as_e4m3(tensor_scale: float) -> None:
    """All 127 numbers, subnormals and 448 among them, decoded by the C library."""
    fmt = GGML_FORMATS["NVFP4"].at_tensor_scale(tensor_scale)
    numbers = torch.arange(0x7F, dtype=torch.uint8)
    halves = numbers.view(torch.float8_e4m3fn).float() / 2
    codes = (torch.arange(127 * 64) % 15).reshape(127, 64).to(torch.int8)
    scales = {"d": (halves * tensor_scale)[:, None].repeat(1, 4)}
    tensor = QuantizedTensor(fmt, codes, scales)
    packed = pack(tensor)
    assert packed.shape == (127, 36)
    assert (packed[:, :4] == numbers.numpy()[:, None]).all()
    assert not packed[0].any()  # under a scale of 0 no code is left
    decoded = ggml_oracle.dequantize(ggml_type("NVFP4").type_id, packed, 64)
    assert same_bits(decoded * np.float32(tensor_scale), tensor.dequantize())
    by_package = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.NVFP4)
    assert same_bits(by_package * np.float32(tensor_scale), tensor.dequantize())


def test_scales_that_nvfp4_lacks() -> None:
    fmt = GGML_FORMATS["NVFP4"].at_tensor_scale(2.0**-10)
    codes = torch.zeros(2, 64, dtype=torch.int8)
    for wrong in (240.0, -1.0, 17 / 16, 2.0**-11):
        scales = {"d": torch.full((2, 4), wrong * 2.0**-10)}
        with pytest.raises(VerificationError, match="ue4m3"):
            pack(QuantizedTensor(fmt, codes, scales))
    with pytest.raises(UnsupportedError, match="96"):
        pack(QuantizedTensor(fmt, torch.zeros(2, 96, dtype=torch.int8), {"d": torch.ones(2, 6)}))
