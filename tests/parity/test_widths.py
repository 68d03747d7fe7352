"""Every type at widths that hold its blocks and at widths that don't, as llama-quantize has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from exporters.gguf import gguf_name
from pipeline.demo.train import Sizes
from pipeline.errors import UnsupportedError
from pipeline.mixes import BASES
from pipeline.recipe import WEIGHT_TYPES
from pipeline.recipe_files import load_recipe
from pipeline.stages.export import export_twin
from pipeline.stages.load import Source, open_source
from runtimes import llamacpp
from tests.deploying import deploy, gate_statuses
from tests.tiny import TRAINED_SIZES, make_checkpoint, trained_checkpoint

WIDE = replace(TRAINED_SIZES, hidden=256, intermediate=512, head_dim=64)
ODD = replace(TRAINED_SIZES, hidden=448, intermediate=896, heads=14)
"""The widths of small Qwen models are multiples of 32 only."""

UNREADABLE = ("Q2_0", "MXFP4", "NVFP4")
"""The gguf package cannot read the first, llama-quantize has the second for experts only and does
not write the third."""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine blocks, so that mixes treat some of them differently; an untied head."""
    return make_checkpoint(
        tmp_path_factory.mktemp("odd"),
        "qwen2",
        num_hidden_layers=9,
        hidden_size=448,
        intermediate_size=896,
        num_attention_heads=14,
        head_dim=32,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def floating(odd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its GGUF file in full precision."""
    path = tmp_path_factory.mktemp("floating") / "model.gguf"
    source = opened(odd, "Q8_0")
    export_twin(path, source.read, source)
    return path


def opened(folder: Path, kind: str, *, allow_fallback: bool = True) -> Source:
    options = {"model": str(folder), "type": kind, "allow_fallback": allow_fallback}
    return open_source(load_recipe(options=options).recipe, allow_pickle=False)


@pytest.mark.parametrize("kind", [kind for kind in BASES if kind not in UNREADABLE])
def test_fallbacks_are_those_of_llama_quantize(
    kind: str, odd: Path, floating: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    stock = tmp_path / "stock.gguf"
    plan = opened(odd, kind).plan
    types = {gguf_name(name): taken for name, taken in plan.types.items()}
    importance = {
        tensor.name: np.ones(tensor.shape[0], np.float32)
        for tensor in gguf.GGUFReader(floating).tensors
        if tensor.name.startswith("blk") and tensor.name in types
    }
    llamacpp.quantize(floating, stock, kind, imatrix=importance)
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(stock).tensors}
    assert {name: found[name] for name in types} == types


@pytest.mark.parametrize("kind", ["Q2_K", "Q4_K_M", "IQ4_XS", "TQ2_0", "IQ2_XXS", "IQ3_M"])
def test_fallbacks_are_refused_unless_allowed(kind: str, odd: Path) -> None:
    with pytest.raises(UnsupportedError, match="allow-fallback"):
        opened(odd, kind, allow_fallback=False)


def climb(sizes: Sizes, kind: str, output: Path) -> None:
    """The whole ladder; what the runtime cannot be asked is the only thing that may be missing."""
    options = {"type": kind, "pure": True, "allow_fallback": True}
    report = deploy(trained_checkpoint("llama", sizes), output, options)
    statuses = gate_statuses(report)
    allowed = {("bytes", "gguf.quants")} if kind == "Q2_0" else set()
    assert {key for key, status in statuses.items() if status != "green"} <= allowed, report.gates
    assert report.exit_code == 0
    replaced = report.counts["types replaced"]
    wide = kind.endswith("_K") or kind.startswith(("IQ2", "IQ3", "TQ")) or kind == "IQ4_XS"
    block = 256 if wide else 32
    assert (replaced > 0) == (sizes.hidden % block > 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_every_type_climbs_the_ladder(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    climb(WIDE, kind, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_every_type_climbs_it_at_widths_that_do_not_divide(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    climb(ODD, kind, tmp_path / "out")
