"""Codes and scales back from packed rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.gguf import pack, unpack
from pipeline.errors import InputError, UnsupportedError
from pipeline.quantization.formats import QuantizedTensor, get_format
from runtimes.ggml_types import dequantize

KINDS = ("Q4_0", "Q2_0", "Q8_0")


def random_tensor(kind: str, rows: int = 5, width: int = 256) -> QuantizedTensor:
    """Every code occurs; a scale of 0, a negative and a subnormal one as well."""
    fmt, generator = get_format(kind), torch.Generator().manual_seed(0)
    top = fmt.code_min + len(fmt.levels)
    codes = torch.randint(fmt.code_min, top, (rows, width), generator=generator)
    d = torch.randn(rows, width // fmt.group_size, generator=generator).half().float()
    d[0, 0], d[1, 0], d[2, 0] = 0.0, -65504.0, 2.0**-24
    return QuantizedTensor(fmt, codes.to(torch.int8), {"d": d})


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_inverse_of_packing(kind: str) -> None:
    solved = random_tensor(kind)
    rows = pack(solved)
    back = unpack(rows, kind, 256)
    assert back.format == solved.format
    assert torch.equal(back.codes, solved.codes)
    assert torch.equal(back.scales["d"].view(torch.int32), solved.scales["d"].view(torch.int32))
    assert torch.equal(back.dequantize(), dequantize(rows, kind, 256))


def test_what_is_refused() -> None:
    rows = pack(random_tensor("Q8_0"))
    with pytest.raises(UnsupportedError, match="codes of Q4_1 cannot be taken over"):
        unpack(rows, "Q4_1", 256)
    with pytest.raises(InputError, match="do not hold 512 weights"):
        unpack(rows, "Q8_0", 512)
    rows[3, 2] = np.array(-128, np.int8).view(np.uint8)
    with pytest.raises(InputError, match="none that this project writes"):
        unpack(rows, "Q8_0", 256)
    rows = pack(random_tensor("Q4_0"))
    rows[0, :2] = np.array([np.inf], "<f2").view(np.uint8)
    with pytest.raises(InputError, match="none that this project writes"):
        unpack(rows, "Q4_0", 256)


@pytest.mark.parametrize("tensor_scale", [None, 2.0**-12])
def test_nvfp4_is_taken_over_with_its_tensor_scale(tensor_scale: float | None) -> None:
    fmt = get_format("NVFP4").at_tensor_scale(tensor_scale or 1.0)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 15, (127, 192), generator=generator).to(torch.int8)
    numbers = torch.arange(127, dtype=torch.uint8)[:, None].repeat(1, 12)
    d = numbers.view(torch.float8_e4m3fn).float() / 2 * (tensor_scale or 1.0)
    codes[0] = 7  # a scale of 0 leaves no other
    solved = QuantizedTensor(fmt, codes, {"d": d})
    rows = pack(solved)
    back = unpack(rows, "NVFP4", 192, tensor_scale)
    assert back.format == fmt
    assert torch.equal(back.codes, codes)
    assert torch.equal(back.scales["d"], d)
    assert np.array_equal(pack(back), rows)
    decoded = dequantize(rows, "NVFP4", 192) * (tensor_scale or 1.0)
    assert torch.equal(back.dequantize(), decoded)


def test_what_is_refused_of_nvfp4() -> None:
    ones = QuantizedTensor(
        get_format("NVFP4"), torch.full((1, 64), 9, dtype=torch.int8), {"d": torch.ones(1, 4)}
    )
    for at, byte in ((0, 0x7F), (3, 0x80 | 0x38), (4, 0x08), (20, 0x80)):  # the last two are -0
        rows = pack(ones)
        rows[0, at] = byte
        with pytest.raises(InputError, match="none that this project writes"):
            unpack(rows, "NVFP4", 64)
    with pytest.raises(InputError, match=r"cannot have the tensor scale 0\.3"):
        unpack(pack(ones), "NVFP4", 64, 0.3)
    with pytest.raises(InputError, match="Q8_0 cannot have the tensor scale"):
        unpack(pack(random_tensor("Q8_0")), "Q8_0", 256, 2.0)
