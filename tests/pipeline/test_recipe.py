"""Recipes: layers and their origins, messages, and the way back to TOML."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import UsageError
from pipeline.recipe import TABLE_TYPES, WEIGHT_TYPES, Recipe, recipe_digest, recipe_fields
from pipeline.recipe_files import load_recipe, preset_names, preset_text, to_toml

OTHER_VALUES: dict[str, Any] = {
    "model": "some/model",
    "target": "gguf,onnx",
    "type": "Q2_0",
    "pure": True,
    "target_size": 15_000_000,
    "target_bpw": 3.5,
    "imatrix": "i.gguf",
    "emit": ("kld-base", "imatrix"),
    "token_embedding_type": "Q8_0",
    "tensor_types": ("ffn_down=Q4_0", "attn_.=Q8_0"),
    "output_tensor_type": "F16",
    "allow_fallback": True,
    "device": "cpu",
    "seed": 7,
    "transforms": ("rotate:seed=3,allow_untie=true", "permute"),
    "calibration.source": "text.txt",
    "calibration.samples": 3,
    "calibration.seqlen": 64,
    "calibration.batch": 2,
    "calibration.mismatch": 0.5,
    "calibration.mismatch_estimate": "shrinkage",
    "calibration.gradient_weighting": 0.5,
    "calibration.stream_correction": 0.5,
    "calibration.held_out": 0.25,
    "quantization.scales": "absmax",
    "quantization.hessian": "diagonal",
    "quantization.free_scales": True,
    "quantization.rounding": "nearest",
    "quantization.interleave": "layer",
    "quantization.passes": 3,
    "quantization.metric": "block",
    "quantization.signed": False,
    "quantization.activation_order": False,
    "quantization.orders": 3,
    "quantization.refine_rounds": 5,
    "quantization.magr": 0.01,
    "quantization.bias_correction": True,
    "tuning.steps": 7,
    "tuning.batch": 2,
    "tuning.rate": 0.001,
    "quantization.damping": 0.02,
    "quantization.shrinkage": 0.5,
    "evaluation.source": "other.txt",
    "evaluation.context": 128,
    "evaluation.chunks": 4,
    "evaluation.gptq_context": 256,
    "onnx.attention": "gqa",
    "onnx.packed": True,
    "gates.twin": 1e-4,
    "gates.logits": 1e-2,
    "gates.kernels_rms": 1e-3,
    "gates.kernels_kld": 1e-4,
    "gates.deployed_lnppl": 1e-2,
    "gates.deployed_kld": 1e-2,
    "gates.max_ln_ppl_increase": 0.05,
    "runtime.llamacpp": "off",
    "runtime.time_limit_s": 60,
}
"""A value that no preset has, where there is one, for every key but `revision`."""

BUDGETS = ("target_size", "target_bpw")
REFUSED_WITH_A_BUDGET = {*BUDGETS, "type", "pure", "imatrix", "target"}


def message(*overrides: str, **arguments: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(overrides=overrides, **arguments)
    assert caught.value.fix
    return str(caught.value)


def test_later_layers_win_and_are_named(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('seed = 3\n[calibration]\nsamples = 5\nseqlen = 6\nsource = "a.txt"\n')
    resolved = load_recipe(
        "fast",
        file,
        ["calibration.samples=7", "calibration.seqlen=8", "calibration.samples=9"],
        {"calibration.seqlen": 10, "seed": None},
    )
    recipe, origins = resolved.recipe, resolved.origins
    assert (recipe.calibration.samples, origins["calibration.samples"]) == (9, "--set")
    assert (recipe.calibration.seqlen, origins["calibration.seqlen"]) == (10, "command line")
    assert (recipe.seed, origins["seed"]) == (3, f"file {file}")
    assert origins["quantization.scales"] == "preset fast"
    assert origins["gates.twin"] == "default"
    assert origins.keys() == recipe_fields().keys()


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_set_nothing_that_a_file_could_not_unset(name: str) -> None:
    resolved = load_recipe(name)
    values = resolved.recipe.flat()
    assert all(values[k] is not None for k, o in resolved.origins.items() if o != "default")
    assert preset_text(name).startswith("# ")


def test_presets_grow() -> None:
    assert set(preset_names()) == {"fast", "balanced", "best"}
    samples = [load_recipe(p).recipe.calibration.samples for p in ("fast", "balanced", "best")]
    assert samples == sorted(samples)


@pytest.mark.parametrize(("key", "value"), OTHER_VALUES.items())
def test_every_key_changes_the_digest(key: str, value: Any) -> None:
    before = load_recipe().recipe
    after = load_recipe(options={key: value}).recipe
    assert after.flat()[key] == value
    assert recipe_digest(after) != recipe_digest(before)


def test_every_key_is_described_and_covered_here() -> None:
    assert set(OTHER_VALUES) | {"revision"} == recipe_fields().keys()
    assert all(field.description for field in recipe_fields().values())


@pytest.mark.parametrize("budget", [None, *BUDGETS])
def test_toml_round_trip_of_a_recipe_with_every_key_set(tmp_path: Path, budget: str | None) -> None:
    left_out = REFUSED_WITH_A_BUDGET - {budget} if budget else set(BUDGETS)
    values = {key: value for key, value in OTHER_VALUES.items() if key not in left_out}
    given_recipe = load_recipe(options={**values, "revision": "main"})
    for text in (to_toml(given_recipe.recipe), to_toml(given_recipe.recipe, given_recipe.origins)):
        file = tmp_path / "r.toml"
        file.write_text(text, encoding="utf-8")
        assert load_recipe("best", file).recipe == given_recipe.recipe


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(1e-300, 1e300))
def test_toml_writes_what_the_standard_library_reads(text: str, number: float) -> None:
    recipe = Recipe.model_validate({"model": text, "gates": {"twin": number}})
    read = tomllib.loads(to_toml(recipe, dict.fromkeys(recipe_fields(), text)))
    assert read["model"] == text
    assert read["gates"]["twin"] == number


def test_digest_is_the_same_in_another_process() -> None:
    code = "from pipeline.recipe import *; print(recipe_digest(Recipe(seed=5)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == recipe_digest(Recipe(seed=5)) != recipe_digest(Recipe(seed=6))


def test_only_what_decides_the_weights_is_decisive() -> None:
    decisive = Recipe().decisive()
    assert {"model", "type", "calibration.samples", "quantization.damping"} <= decisive.keys()
    judging = ("evaluation", "gates", "runtime", "onnx")
    assert not any(key.startswith(judging) for key in decisive)


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Recipe().seed = 1  # type: ignore[misc]


def test_import_needs_no_torch() -> None:
    code = "import sys, pipeline.recipe_files; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_names_are_those_of_the_formats() -> None:
    from pipeline.quantization.formats import GGML_FORMATS

    assert set(WEIGHT_TYPES) == set(GGML_FORMATS)
    assert set(TABLE_TYPES) - set(WEIGHT_TYPES) == {"F16", "F32"}


def test_types_may_be_written_in_lower_case() -> None:
    assert load_recipe(overrides=["type=q2_0"]).recipe.type == "Q2_0"
    assert load_recipe(overrides=["target=onnx", "type=int3_g64"]).recipe.type == "INT3_G64"


def test_targets_are_listed_the_main_one_first() -> None:
    assert load_recipe(overrides=["target=onnx"]).recipe.targets == ("onnx",)
    assert load_recipe(overrides=["target=onnx,gguf"]).recipe.targets == ("gguf", "onnx")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("other", sorted(REFUSED_WITH_A_BUDGET))
def test_a_budget_refuses_what_it_replaces(budget: str, other: str) -> None:
    if other == budget:
        return
    options = {key: OTHER_VALUES[key] for key in (budget, other)}
    text = message(options=options)
    assert ("is given too" in text) == (other not in ("imatrix", "target"))
    assert "(command line)" in text
    assert "leave " in text


def test_a_budget_is_for_gguf_alone() -> None:
    text = message(options={"target": "gguf,onnx", "target_bpw": 3.5})
    assert "among types of GGUF" in text


def test_a_budget_leaves_the_type_open() -> None:
    recipe = load_recipe(options={"target_bpw": 3.5, "output_tensor_type": "Q6_K"}).recipe
    assert (recipe.type, recipe.budgeted, recipe.label) == (None, True, "3.5bpw")
    assert (Recipe().type, Recipe().budgeted) == (None, False)
    assert (Recipe().weight_type, Recipe().label) == ("Q4_0", "Q4_0")
    assert Recipe(type="Q2_K").label == "Q2_K"


@pytest.mark.parametrize(
    ("text", "size", "label"),
    [
        ("15MB", 15_000_000, "15MB"),
        ("15m", 15_000_000, "15MB"),
        ("14.5 MiB", 15_204_352, "15204352B"),
        ("1kib", 1024, "1024B"),
        ("2.5G", 2_500_000_000, "2500MB"),
        ("1.0001k", 1000, "1KB"),
        ("0.3KB", 300, "300B"),
        (".5GiB", 2**29, "536870912B"),
        ("7b", 7, "7B"),
        ("15000001", 15_000_001, "15000001B"),
        ("1T", 10**12, "1000GB"),
    ],
)
def test_sizes(text: str, size: int, label: str) -> None:
    for options in ({"target_size": text}, {"target_size": size}):
        recipe = load_recipe(options=options).recipe
        assert (recipe.target_size, recipe.label) == (size, label)
    assert load_recipe(overrides=[f"target_size={text}"]).recipe.target_size == size


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model=org/name", "org/name"),
        ('model="42"', "42"),
        ("model = a = b", "a = b"),
        ("model=", None),
        ('model="x"\nseed=4', '"x"\nseed=4'),
        ("gates.twin=1e-4", 1e-4),
        ("gates.twin=1", 1.0),
        ("quantization.signed=false", False),
        ("transforms=[]", ()),
        ("transforms=['rotate:seed=0,allow_untie=true']", ("rotate:allow_untie=true",)),
        ("transforms=['equalize:alpha=0.25, method=range']", ("equalize:alpha=0.25",)),
    ],
)
def test_set_reads_toml_or_else_text(text: str, value: Any) -> None:
    key = text.partition("=")[0].strip()
    assert load_recipe(overrides=[text]).recipe.flat()[key] == value


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("calibration.sample=1", ["unknown recipe key", "(--set)", "calibration.samples?"]),
        ("samples=1", ["did you mean calibration.samples?"]),
        ("seqlne=1", ["did you mean calibration.seqlen?"]),
        ("nothing.like.it=1", ["`python -m pipeline recipe` prints every key"]),
        ("calibration=1", ["is a section", "calibration.seqlen"]),
        ("type=Q4_O", ["type = 'Q4_O'", "did you mean Q4_0?"]),
        ("type=INT4_G32", ["GGUF cannot hold INT4_G32", "Q4_0 is what INT4_G32 is called"]),
        ("type=INT4_G48", ["unknown type", "known: Q2_0", "INT4_G32 ... for ONNX"]),
        ("token_embedding_type=INT8_G64", ["GGUF cannot hold INT8_G64"]),
        ("tensor_types=['attn=INT4_G64']", ["GGUF cannot hold INT4_G64"]),
        ("onnx.attention=gqs", ["did you mean gqa?"]),
        ("type=F16", ["unknown type"]),
        ("output_tensor_type=F61", ["did you mean F16?"]),
        ("quantization.scales=pizo", ["did you mean piso?"]),
        ("target=ggfu", ["did you mean gguf?"]),
        ("runtime.llamacpp=of", ["did you mean off?"]),
        ("transforms=['rotat']", ["unknown transform 'rotat'", "did you mean rotate?"]),
        ("transforms=['rotate:sed=1']", ["rotate has no option 'sed'", "did you mean seed?"]),
        ("transforms=['rotate:seed']", ["rotate has no option 'seed'"]),
        ("transforms=['fold:seed=1']", ["fold has no option 'seed'"]),
        ("transforms=['rotate:seed=x']", ["rotate:seed is a number, not 'x'"]),
        ("transforms=['rotate:seed=-1']", ["rotate:seed=-1 is outside 0"]),
        ("transforms=['equalize:alpha=1.5']", ["outside 0 .. 1"]),
        ("transforms=['rotate:signs=yes']", ["true or false, not 'yes'"]),
        ("transforms=['rotate:matrix=hadamrd']", ["did you mean hadamard?"]),
        ("transforms=['rotate:spaces=values+iner']", ["rotate:spaces knows no 'iner'"]),
        ("transforms=['rotate:matrix=hadamard+orthogonal']", ["rotate:matrix knows no"]),
        ("seed=-1", ["seed = -1", "greater than or equal to 0", "for example seed = 0"]),
        ("seed=1.5", ["seed = 1.5", "valid integer"]),
        ("seed=true", ["valid integer"]),
        ("seed=9223372036854775808", ["less than"]),
        ("calibration.samples=0", ["greater than or equal to 1"]),
        ("calibration.seqlen=1", ["greater than or equal to 2"]),
        ("calibration.mismatch=1.5", ["less than or equal to 1"]),
        ("calibration.source=''", ["at least 1 character"]),
        ("quantization.signed=1", ["valid boolean"]),
        ("quantization.damping=nan", ["finite"]),
        ("gates.twin=0", ["greater than 0"]),
        ("gates.twin=inf", ["finite"]),
        ("target=", ["target = None", 'for example target = "gguf"']),
        ("target_size=0", ["target_size = 0", "greater than or equal to 1"]),
        ("target_size=15XB", ["'15XB' is no size such as 15MB", "leave target_size out"]),
        ("target_size=-1", ["greater than or equal to 1"]),
        ("target_size=-1MB", ["is no size"]),
        ("target_size=1.5", ["target_size = 1.5", "integer"]),
        ("target_size=true", ["integer"]),
        ("target_bpw=0", ["greater than 0"]),
        ("target_bpw=inf", ["finite"]),
        ("target_bpw=3,5", ["target_bpw = '3,5'"]),
        ("revision=main", ["no model is given", "leave revision out"]),
        ("seed", ["key=value", "--set calibration.samples=64"]),
        ("=1", ["key=value"]),
    ],
)
def test_messages_name_the_value_the_rule_and_the_fix(override: str, parts: list[str]) -> None:
    text = message(override)
    assert all(part in text for part in parts), text


def test_message_names_the_layer_of_a_bad_value(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[calibration]\nsamples = -4\n")
    assert f"calibration.samples = -4 is not valid (file {file})" in message(file=file)
    assert "(command line)" in message(options={"calibration.seqlen": 0})


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"type = Q4_0\n", "line 1"),
        (b"[calibration\n", "line 1"),
        (b"\xff\xfe", "decode"),
        (b"[calibrations]\nsamples = 2\n", "did you mean calibration.samples?"),
        (b"calibration.samples.x = 2\n", "unknown recipe key"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, part: str) -> None:
    file = tmp_path / "r.toml"
    file.write_bytes(content)
    assert part in message(file=file)


def test_transforms_may_be_tables(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(
        '[[transform]]\nkind = "rotate"\nallow_untie = true\nseed = 4\n'
        '[[transform]]\nkind = "equalize"\nalpha = 0.75\n[calibration]\nsamples = 3\n'
    )
    recipe = load_recipe(file=file).recipe
    assert recipe.transforms == ("rotate:seed=4,allow_untie=true", "equalize:alpha=0.75")
    assert recipe.calibration.samples == 3
    again = tmp_path / "again.toml"
    again.write_text(to_toml(recipe))
    assert load_recipe(file=again).recipe == recipe


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('[[transform]]\nmatrix = "hadamard"\n', "needs a kind"),
        ("[[transform]]\nkind = 3\n", "needs a kind"),
        ('transform = "rotate"\n', "either [[transform]] tables or one list"),
        ('transform = ["rotate"]\n', "cannot be read"),
        ('transforms = []\n[[transform]]\nkind = "fold"\n', "either"),
        ('[[transform]]\nkind = "rotate"\nsede = 1\n', "rotate has no option 'sede'"),
    ],
)
def test_tables_that_are_no_transform(tmp_path: Path, content: str, part: str) -> None:
    file = tmp_path / "r.toml"
    file.write_text(content)
    assert part in message(file=file)


def test_missing_file_and_unknown_preset(tmp_path: Path) -> None:
    assert "cannot read the recipe" in message(file=tmp_path / "absent.toml")
    assert "did you mean balanced?" in message(preset="balancd")


def test_text_that_is_not_unicode_is_refused() -> None:
    assert "unicode" in message(options={"model": "\udcff"})
