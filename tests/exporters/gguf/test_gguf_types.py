"""Sizes and file types against the installed llama.cpp."""

import pytest

from exporters.gguf.types import file_type, ggml_type, row_bytes
from pipeline.errors import UnsupportedError
from pipeline.mixes import BASES

# fmt: off
NAMES = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS",
    "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL",
    "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0",
)
# fmt: on


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_library(name: str) -> None:
    ggml_oracle = pytest.importorskip("ggml_oracle")
    kind = ggml_type(name)
    assert ggml_oracle.traits(kind.type_id) == (
        name.lower() if name.rstrip("K") == name else name[:-1].lower() + "K",
        kind.block,
        kind.nbytes,
    )


@pytest.mark.parametrize("name", NAMES)
def test_file_types_are_those_of_the_library(name: str) -> None:
    lc = pytest.importorskip("llama_cpp")
    constants = [f"LLAMA_FTYPE_MOSTLY_{name}{suffix}" for suffix in ("_S", "_MOE", "")]
    if name in ("F32", "Q2_K"):  # Q2_K_S is another mix than Q2_K
        constants = [f"LLAMA_FTYPE_{'ALL' if name == 'F32' else 'MOSTLY'}_{name}"]
    if name in ("IQ2_S", "IQ3_S", "Q3_K", "Q4_K", "Q5_K", "IQ1_S"):
        constants = [f"LLAMA_FTYPE_MOSTLY_{name}", f"LLAMA_FTYPE_MOSTLY_{name}_S"]
    found = [getattr(lc, constant) for constant in constants if hasattr(lc, constant)]
    assert found[0] == file_type(name)


@pytest.mark.parametrize("name", sorted(BASES))
def test_file_types_of_mixes_are_those_of_the_library(name: str) -> None:
    lc = pytest.importorskip("llama_cpp")
    constants = [f"LLAMA_FTYPE_MOSTLY_{name}{suffix}" for suffix in ("", "_MOE")]
    found = [getattr(lc, constant) for constant in constants if hasattr(lc, constant)]
    assert found == [file_type(name)]


def test_row_bytes() -> None:
    assert row_bytes("Q2_0", 896) == 14 * 18
    assert row_bytes("Q6_K", 512) == 420
    assert row_bytes("F32", 3) == 12


@pytest.mark.parametrize("width", [0, -64, 100])
def test_widths_that_are_no_whole_blocks(width: int) -> None:
    with pytest.raises(UnsupportedError, match="Q4_0"):
        row_bytes("Q4_0", width)


@pytest.mark.parametrize("name", ["Q8_K", "I32", "q4_0", "Q3_0"])
def test_types_that_model_files_cannot_hold(name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        file_type(name)
