"""Decoders of ggml types, bit for bit against the C library and the `gguf` package."""

import ggml_library
import gguf
import numpy as np
import pytest
import torch

from exporters.gguf.type_sizes import GGML_TYPES
from pipeline.errors import InputError, UnsupportedError
from runtimes.ggml_types import DECODERS, dequantize, offsets

WIDTH = 512
SIZES = {kind.name: (kind.block, kind.nbytes) for kind in GGML_TYPES.values()}


def random_blocks(type_name: str, rows: int = 300) -> np.ndarray:
    """Any bytes, so every code, sign and subnormal occurs, but finite scales."""
    rng = np.random.default_rng(len(type_name))
    block, nbytes = SIZES[type_name]
    blocks = rng.integers(0, 256, (rows * WIDTH // block, nbytes), dtype=np.uint8)
    scale_bytes = {
        **{name: [1, 3] for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")},
        "Q2_K": [81, 83],
        "Q3_K": [109],
        "Q6_K": [209],
        "TQ1_0": [53],
        "TQ2_0": [65],
        "F32": [3],
        "MXFP4": [],
        "NVFP4": [],
    }
    for at in scale_bytes.get(type_name, [1]):
        blocks[:, at] &= 0xBF  # clears the top exponent bit
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("type_name", DECODERS)
def test_any_bytes_decode_as_in_the_c_library(type_name: str) -> None:
    raw = random_blocks(type_name)
    ours = dequantize(raw, type_name, WIDTH).numpy()
    theirs = ggml_library.to_float(raw, type_name, WIDTH)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("type_name", sorted(set(DECODERS) - {"Q2_0", "F32"}))
def test_any_bytes_decode_as_in_the_gguf_package(type_name: str) -> None:
    raw = random_blocks(type_name)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    np.testing.assert_array_equal(dequantize(raw, type_name, WIDTH).numpy(), theirs)


@pytest.mark.parametrize("type_name", DECODERS)
def test_block_sizes_are_those_of_the_file_format(type_name: str) -> None:
    decoder = DECODERS[type_name]
    assert (decoder.block, decoder.nbytes) == SIZES[type_name]


def test_offsets_are_what_a_zero_code_decodes_to() -> None:
    raw = random_blocks("Q4_1").reshape(-1, 20).copy()
    raw[:, 4:] = 0
    raw = raw.reshape(300, -1)
    found = offsets(raw, "Q4_1", WIDTH)
    assert found is not None
    assert found.shape == (300, WIDTH // 32)
    torch.testing.assert_close(
        found.repeat_interleave(32, 1), dequantize(raw, "Q4_1", WIDTH), rtol=0, atol=0
    )
    assert offsets(random_blocks("Q4_0"), "Q4_0", WIDTH) is None


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_blocks("Q6_K")
    whole = dequantize(raw, "Q6_K", WIDTH)
    monkeypatch.setattr("runtimes.ggml_types._CHUNK_WEIGHTS", 7 * WIDTH)
    assert torch.equal(dequantize(raw, "Q6_K", WIDTH), whole)


def test_unknown_type_and_wrong_rows_are_refused() -> None:
    raw = random_blocks("Q4_0")
    with pytest.raises(UnsupportedError, match="no decoder for ggml type IQ1_S"):
        dequantize(raw, "IQ1_S", WIDTH)
    for width in (0, 33, WIDTH - 32):
        with pytest.raises(InputError, match="is not Q4_0 with rows"):
            dequantize(raw, "Q4_0", width)
    with pytest.raises(InputError):
        offsets(raw.view(np.int8), "Q4_0", WIDTH)
