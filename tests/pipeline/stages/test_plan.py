"""Types of the matrices of a checkpoint: mixes, pure files, patterns, fallbacks, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import open_checkpoint
from pipeline.errors import UnsupportedError, UsageError
from pipeline.recipe_files import load_recipe
from pipeline.stages.plan import TypePlan, plan_types
from tests.tiny import make_checkpoint

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def plan(folder: Path, **options: Any) -> TypePlan:
    recipe = load_recipe(options=options).recipe
    return plan_types(open_checkpoint(str(folder)), recipe)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden 256, two blocks, a head of its own."""
    folder = tmp_path_factory.mktemp("wide")
    return make_checkpoint(
        folder, hidden_size=256, intermediate_size=512, head_dim=64, tie_word_embeddings=False
    )


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    return make_checkpoint(
        folder, hidden_size=256, intermediate_size=512, head_dim=64, tie_word_embeddings=True
    )


def test_a_mix_and_its_tables(wide: Path) -> None:
    types = plan(wide, type="Q2_K").types
    assert types["model.layers.1.self_attn.v_proj.weight"] == "Q3_K"
    assert types["model.layers.1.self_attn.q_proj.weight"] == "Q2_K"
    assert (types[EMBEDDING], types[HEAD]) == ("Q2_K", "Q6_K")


def test_a_pure_file_has_one_type(wide: Path, tied: Path) -> None:
    assert set(plan(wide, type="Q2_K", pure=True).types.values()) == {"Q2_K"}
    assert set(plan(tied, type="Q4_K", pure=True).types.values()) == {"Q4_K"}
    # The mix IQ2_S is made of IQ2_XS, but a pure file is of the type that was named.
    assert plan(wide, type="IQ2_S").types["model.layers.1.mlp.up_proj.weight"] == "IQ2_XS"
    assert set(plan(wide, type="IQ2_S", pure=True).types.values()) == {"IQ2_S"}
    assert set(plan(wide, type="IQ2_M", pure=True).types.values()) == {"IQ2_S"}


@pytest.mark.parametrize("rounding", ["gptaq", "gpfq"])
def test_methods_that_cannot_choose_vectors_are_refused_before_any_work(
    rounding: str, wide: Path
) -> None:
    method = {"quantization.rounding": rounding}
    with pytest.raises(UnsupportedError, match=f"cannot be rounded by {rounding}"):
        plan(wide, type="IQ3_S", **method)
    tables = {"token_embedding_type": "IQ3_S"}  # rounded to nearest, without data
    assert plan(wide, type="Q4_0", **tables, **method).types[EMBEDDING] == "IQ3_S"


def test_explicit_tables_win(wide: Path, tied: Path) -> None:
    tables = {"token_embedding_type": "Q8_0", "output_tensor_type": "F16"}
    types = plan(wide, type="Q2_K", pure=True, **tables).types
    assert (types[EMBEDDING], types[HEAD]) == ("Q8_0", "F16")
    types = plan(tied, type="Q4_0", **tables).types
    assert (types[EMBEDDING], types[HEAD]) == ("Q8_0", "F16")
    assert plan(tied, type="Q4_0").types[EMBEDDING] == "Q6_K"
    for one in tables:
        types = plan(tied, type="Q4_0", **{one: "Q5_K"}).types
        assert types[EMBEDDING] == "Q5_K"
        assert HEAD not in types


def test_the_first_pattern_that_fits_decides(wide: Path) -> None:
    rules = (r"ffn_down=q5_k", r"blk\.0\.=Q8_0", "output.weight=F32")
    types = plan(wide, type="Q4_0", tensor_types=rules).types
    assert types["model.layers.0.mlp.down_proj.weight"] == "Q5_K"
    assert types["model.layers.0.mlp.up_proj.weight"] == "Q8_0"
    assert types["model.layers.1.mlp.up_proj.weight"] == "Q4_0"
    assert types[HEAD] == "F32"
    with pytest.raises(UsageError, match="nothing_like_it decides the type of no tensor"):
        plan(wide, tensor_types=("nothing_like_it=Q8_0",))


@pytest.mark.parametrize("target", ["onnx", "gguf,onnx"])
def test_onnx_knows_no_mix_and_has_tables_of_its_own(wide: Path, tied: Path, target: str) -> None:
    types = plan(wide, target=target, type="Q4_0").types
    assert (types.pop(EMBEDDING), types.pop(HEAD)) == ("F16", "Q8_0")
    assert set(types.values()) == {"Q4_0"}
    types = plan(tied, target=target, type="Q4_0").types
    assert (types[EMBEDDING], HEAD in types) == ("Q8_0", False)
    types = plan(wide, target="onnx", type="INT3_G64", output_tensor_type="INT4_G32").types
    assert (types[EMBEDDING], types[HEAD]) == ("F16", "INT4_G32")


def test_groups_of_integer_types_shrink_to_the_width(tmp_path: Path) -> None:
    """160 = 5 x 32 and 80 = 5 x 16."""
    make_checkpoint(tmp_path, hidden_size=160, intermediate_size=256, head_dim=40)
    with pytest.raises(UnsupportedError, match=r"INT4_G128 -> INT4_G32 \(width 160\)"):
        plan(tmp_path, target="onnx", type="INT4_G128")
    found = plan(tmp_path, target="onnx", type="INT4_G128", allow_fallback=True).types
    assert found["model.layers.0.mlp.up_proj.weight"] == "INT4_G32"
    assert found["model.layers.0.mlp.down_proj.weight"] == "INT4_G128"


def test_sizes_of_integer_types_are_those_of_the_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, hidden_size=256, intermediate_size=512, head_dim=64)
    shapes = {"model.layers.0.mlp.up_proj.weight": (512, 256)}
    for kind, nbytes in (("INT3_G64", 4 / 8 + 2 / 64), ("INT2_G128", 2 / 8 + 2 / 128)):
        found = plan(folder, target="onnx", type=kind)
        assert found.size_bytes(shapes) == 512 * 256 * nbytes
    found = plan(folder, target="onnx", type="INT3_G64")
    assert found.size_bytes(shapes, packed=True) == 512 * 256 * (3 / 8 + 2 / 64)


@pytest.mark.parametrize("text", ["Q8_0", "=Q8_0", "attn=Q9_9", "(=Q8_0"])
def test_wrong_patterns_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="tensor_types"):
        load_recipe(options={"tensor_types": (text,)})


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        *(("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1")),
        *(("Q6_K", "Q8_0"), ("IQ4_XS", "IQ4_NL"), ("TQ1_0", "Q4_0"), ("TQ2_0", "Q4_0")),
        *((kind, "IQ4_NL") for kind in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")),
    ],
)
def test_widths_that_do_not_divide(kind: str, taken: str, tmp_path: Path) -> None:
    """448 is no multiple of 256: llama-quantize's replacements, refused unless allowed."""
    make_checkpoint(tmp_path, hidden_size=448, intermediate_size=512, head_dim=16)
    with pytest.raises(UnsupportedError, match=rf"cannot be stored[\s\S]*{taken}"):
        plan(tmp_path, type=kind, pure=True)
    found = plan(tmp_path, type=kind, pure=True, allow_fallback=True)
    assert found.types["model.layers.0.self_attn.q_proj.weight"] == taken
    assert found.types["model.layers.0.mlp.down_proj.weight"] == kind
    assert (
        f"model.layers.0.self_attn.q_proj.weight: {kind} -> {taken} (width 448)" in found.replaced
    )


def test_sizes_are_those_of_the_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, hidden_size=256, intermediate_size=512, head_dim=64)
    checkpoint = open_checkpoint(str(folder))
    found = plan(folder, type="Q4_K_M")
    shapes = checkpoint.shapes
    expected = 0
    per_block = {"Q4_K": 144 / 256, "Q6_K": 210 / 256, "F32": 4}
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        expected += count * per_block[found.types.get(name, "F32")]
    assert found.size_bytes(shapes) == expected
    assert found.most(shapes) == "Q4_K"
