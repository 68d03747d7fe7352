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
