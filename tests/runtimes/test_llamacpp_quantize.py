"""llama.cpp's own quantizer against gguf's reference quantizers in numpy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from comparing import compare

from pipeline.errors import InputError, ResourceError, UsageError
from runtimes.llamacpp import LlamaCpp, quantize
from runtimes.metrics import Protocol, windows

pytest.importorskip("llama_cpp")

NAME = "blk.1.ffn_down.weight"


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def weights(path: Path, name: str) -> np.ndarray:
    tensor = tensors(path)[name]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_pure_file_holds_the_reference_bytes(demo_gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "q4_0.gguf"
    quantize(demo_gguf, target, "Q4_0", pure=True, token_embedding_type="Q8_0")  # noqa: S106
    found = tensors(target)
    for name, source in tensors(demo_gguf).items():
        kind = gguf.GGMLQuantizationType.Q4_0
        if name == "token_embd.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
        if "norm" in name:
            kind = gguf.GGMLQuantizationType.F32
        assert found[name].tensor_type == kind, name
        expected = gguf.quants.quantize(source.data, kind)
        assert np.array_equal(found[name].data, expected), name


def test_mixture_is_the_default(demo_gguf: Path, tmp_path: Path) -> None:
    quantize(demo_gguf, tmp_path / "mixed.gguf", "Q4_K_M")
    quantize(demo_gguf, tmp_path / "pure.gguf", "Q4_K_M", pure=True)
    mixed, pure = (
        {
            tensor.tensor_type.name
            for name, tensor in tensors(tmp_path / file).items()
            if "ffn" in name
        }
        for file in ("mixed.gguf", "pure.gguf")
    )
    assert mixed == {"Q4_K", "Q6_K", "F32"}
    assert pure == {"Q4_K", "F32"}


def test_output_type_applies_to_a_tied_head(demo_gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "q4_0.gguf"
    quantize(demo_gguf, target, "Q4_0", output_tensor_type="Q8_0")
    assert tensors(target)["token_embd.weight"].tensor_type.name == "Q8_0"


@pytest.mark.parametrize("kind", ["Q4_0", "Q3_K_S"])
def test_importance_moves_the_error(demo_gguf: Path, tmp_path: Path, kind: str) -> None:
    source = weights(demo_gguf, NAME)
    importance = np.where(np.arange(source.shape[1]) % 4 == 0, 100.0, 0.01).astype(np.float32)
    plain, weighted = tmp_path / "plain.gguf", tmp_path / "weighted.gguf"
    quantize(demo_gguf, plain, kind, pure=True)
    quantize(demo_gguf, weighted, kind, pure=True, imatrix={NAME: importance})
    errors = [
        float((importance * (weights(path, NAME) - source) ** 2).sum())
        for path in (plain, weighted)
    ]
    assert errors[1] < 0.8 * errors[0]
    other = "blk.0.ffn_down.weight"
    assert np.array_equal(tensors(plain)[other].data, tensors(weighted)[other].data)


def test_result_runs(demo_gguf: Path, tmp_path: Path, demo_ids: list[int]) -> None:
    target = tmp_path / "q8_0.gguf"
    quantize(demo_gguf, target, "Q8_0")
    tokens = windows(demo_ids, Protocol.gptq_windows(128), None, limit=3)
    result = compare(
        LlamaCpp(demo_gguf).logits(tokens, 0), LlamaCpp(target).logits(tokens, 0), tokens, 0
    )
    assert 1e-6 < result.kld_mean < 1e-2


@pytest.mark.parametrize(
    "option", [{"type": "Q9_9"}, {"token_embedding_type": "Q9_9"}, {"output_tensor_type": "4"}]
)
def test_unknown_type_lists_the_known(
    demo_gguf: Path, tmp_path: Path, option: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"knows no type[\s\S]*Q4_0"):
        quantize(demo_gguf, tmp_path / "x.gguf", **{"type": "Q4_0", **option})


@pytest.mark.parametrize(
    ("imatrix", "message"),
    [
        ({"blk.0.none.weight": np.ones(256)}, "no such tensor"),
        ({NAME: np.ones(3)}, r"shape \[3\], expected \[768\]"),
        ({NAME: np.full(768, np.nan)}, "negative or not finite"),
        ({NAME: np.full(768, -1.0)}, "negative or not finite"),
    ],
)
def test_bad_importance(
    demo_gguf: Path, tmp_path: Path, imatrix: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        quantize(demo_gguf, tmp_path / "x.gguf", "Q4_0", imatrix=imatrix)


def test_failure_keeps_the_old_destination(
    demo_gguf: Path, truncated_gguf: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out" / "model.gguf"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(InputError, match="not within the file bounds"):
        quantize(truncated_gguf, target, "Q4_0")
    with pytest.raises(InputError, match="requires an imatrix"):
        quantize(demo_gguf, target, "IQ2_XS")
    with pytest.raises(ResourceError, match="gave no answer"):
        quantize(demo_gguf, target, "Q2_K", time_limit=0.02)
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    assert target.read_bytes() == b"old"
    quantize(demo_gguf, target, "Q4_0")
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]
    assert target.read_bytes()[:4] == b"GGUF"


def test_quantized_source_is_refused(demo_gguf: Path, tmp_path: Path) -> None:
    quantize(demo_gguf, tmp_path / "q8_0.gguf", "Q8_0")
    with pytest.raises(InputError, match="requantizing"):
        quantize(tmp_path / "q8_0.gguf", tmp_path / "x.gguf", "Q4_0")


def test_missing_places(demo_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        quantize(tmp_path / "none.gguf", tmp_path / "x.gguf", "Q4_0")
    with pytest.raises(InputError, match="is not a directory"):
        quantize(demo_gguf, tmp_path / "none" / "x.gguf", "Q4_0")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a file size limit")
def test_full_disk(demo_gguf: Path, tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # inherited by the child
    try:
        with pytest.raises(ResourceError, match="cannot quantize"):
            quantize(demo_gguf, tmp_path / "x.gguf", "Q8_0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.glob("*x.gguf*"))
