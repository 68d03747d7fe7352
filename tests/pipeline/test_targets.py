"""Which types which target holds, and what --bits, --group-size and --symmetric mean."""

from __future__ import annotations

from itertools import product

import pytest

from exporters.onnx.integers import storage_of
from pipeline.errors import UnsupportedError, UsageError
from pipeline.quantization.formats import GGML_FORMATS, get_format
from pipeline.targets import (
    BOTH,
    GGUF_NAMES,
    SHARED,
    check_held,
    compose_type,
    is_onnx_type,
    parse_targets,
    smaller_group,
)

GROUPS = (8, 16, 24, 32, 48, 64, 128, 256, 512)


@pytest.mark.parametrize(
    ("text", "found"),
    [("gguf", "gguf"), ("ONNX", "onnx"), ("onnx, gguf", "gguf,onnx"), ("onnx,onnx", "onnx")],
)
def test_targets_in_canonical_order(text: str, found: str) -> None:
    assert parse_targets(text) == found


@pytest.mark.parametrize("text", ["", "ggfu", "gguf,", "gguf onnx"])
def test_unknown_targets(text: str) -> None:
    with pytest.raises(ValueError, match="unknown target"):
        parse_targets(text)


@pytest.mark.parametrize(
    "name",
    [f"{u}{b}_G{g}" for u, b, g in product(("INT", "UINT"), range(2, 9), GROUPS)]
    + [f"FP{b}_G{g}" for b, g in product((4, 8), GROUPS)]
    + [f"FINT{b}_G{g}" for b, g in product((2, 4), GROUPS)],
)
def test_types_of_onnx_are_those_that_the_exporter_stores(name: str) -> None:
    try:
        storage_of(get_format(name), (512, 512))
    except UnsupportedError:
        assert not is_onnx_type(name)
    else:
        assert is_onnx_type(name)
        check_held(name, "onnx")


@pytest.mark.parametrize("name", GGML_FORMATS)
def test_ggml_types_that_onnx_holds_are_those_that_the_exporter_stores(name: str) -> None:
    check_held(name, "gguf")
    try:
        storage_of(get_format(name), (512, 512))
    except UnsupportedError:
        for target in ("onnx", "gguf,onnx"):
            with pytest.raises(
                ValueError, match=f"ONNX cannot hold (type|the mix) {name}; it holds Q4_0"
            ):
                check_held(name, target)
    else:
        check_held(name, "gguf,onnx")
        assert name in BOTH


def test_what_both_names_mean_is_the_same() -> None:
    for integer, ggml in GGUF_NAMES.items():
        one, other = get_format(integer), get_format(ggml)
        mirrored = tuple(-level for level in reversed(other.levels))
        assert one.levels in (other.levels, mirrored)
        assert (one.group_size, one.scale_lattice) == (other.group_size, other.scale_lattice)
        assert one.signed_scale
        assert other.signed_scale
        with pytest.raises(ValueError, match=f"{ggml} is what {integer} is called there"):
            check_held(integer, "gguf")
    for (bits, group), ggml in SHARED.items():
        fmt = get_format(ggml)
        assert fmt.group_size == group
        assert len(fmt.levels) in (2**bits, 2**bits - 1)


def test_mixes_belong_to_gguf() -> None:
    check_held("Q4_K_M", "gguf")
    with pytest.raises(ValueError, match=r"the mix Q4_K_M; it holds .* INT4_G32"):
        check_held("Q4_K_M", "onnx")
    with pytest.raises(ValueError, match=r"GGUF cannot hold INT3_G64; both hold Q4_0, .*, MXFP4"):
        check_held("INT3_G64", "gguf,onnx")


@pytest.mark.parametrize(
    ("target", "bits", "group", "kind"),
    [
        ("onnx", None, None, "INT4_G32"),
        ("onnx", 4, 128, "INT4_G128"),
        ("onnx", 3, None, "INT3_G32"),
        ("onnx", 2, None, "INT2_G64"),
        ("onnx", 8, 16, "INT8_G16"),
        ("gguf,onnx", 4, None, "Q4_0"),
        ("gguf,onnx", 2, 64, "Q2_0"),
        ("gguf", 8, None, "Q8_0"),
    ],
)
def test_composed_types(target: str, bits: int | None, group: int | None, kind: str) -> None:
    assert compose_type(target, bits, group, None) == kind
    assert compose_type(target, bits, group, True) == kind
    check_held(kind, target)


@pytest.mark.parametrize(("bits", "kind"), [(4, "UINT4_G32"), (3, "UINT3_G32"), (2, "UINT2_G64")])
def test_asymmetric_types(bits: int, kind: str) -> None:
    assert compose_type("onnx", bits, None, False) == kind
    check_held(kind, "onnx")
    with pytest.raises(ValueError, match="GGUF cannot hold UINT"):
        check_held(kind, "gguf,onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onnx", 5, None, None), "2, 3, 4 or 8 bits"),
        (("onnx", 4, 48, None), "16, 32, 64, 128, 256"),
        (("onnx", 2, 16, None), "use 32, 64, 128"),
        (("gguf,onnx", 3, None, None), "GGUF has no such type"),
        (("gguf", 4, 64, None), "4 bits in groups of 32"),
        (("onnx", 8, None, False), "with 2, 3 and 4 bits"),
        (("gguf,onnx", 4, None, False), "with 2, 3 and 4 bits"),
    ],
)
def test_types_that_there_are_not(
    arguments: tuple[str, int, int | None, bool | None], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        compose_type(*arguments)


def test_smaller_groups_end_where_the_runtime_has_none() -> None:
    assert smaller_group("INT4_G64") == "INT4_G32"
    assert smaller_group("UINT3_G32") == "UINT3_G16"
    assert smaller_group("INT4_G16") is None
    assert smaller_group("INT2_G32") is None
    assert smaller_group("FP4_G64") == "FP4_G32"
    assert smaller_group("FP8_G16") is None
    assert smaller_group("Q4_0") is None
