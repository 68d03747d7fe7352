"""Quantizing under an importance matrix: the optimum of the diagonal H, and nothing silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from exporters.gguf import gguf_name
from exporters.gguf.imatrix import read_imatrix, write_imatrix
from pipeline.checkpoint import open_checkpoint
from pipeline.errors import InputError, PipelineError, UsageError
from pipeline.identity import identity_of_importance
from pipeline.progress import open_progress
from pipeline.recipe import Recipe
from pipeline.recipe_files import load_recipe
from pipeline.run_directory import RunDirectory
from pipeline.stages.importance import importance_of, quantize_weighted
from pipeline.stages.load import Source, open_source
from tests.deploying import deploy, gate_statuses
from tests.tiny import trained_checkpoint

DOWN = "model.layers.1.mlp.down_proj.weight"


def importance(seed: int = 0) -> dict[str, np.ndarray]:
    """Unequal channels for every decoder matrix of the trained checkpoint."""
    rng = np.random.default_rng(seed)
    shapes = open_checkpoint(str(trained_checkpoint("llama"))).shapes
    return {
        gguf_name(name): np.exp(2 * rng.standard_normal(shape[1])).astype(np.float32)
        for name, shape in shapes.items()
        if "proj" in name
    }


def write(path: Path, means: dict[str, np.ndarray]) -> str:
    write_imatrix(path, means, tokens=64, chunk=32, dataset="x")
    return str(path)


def weights(folder: Path, name: str) -> np.ndarray:
    (path,) = folder.glob("*.gguf")
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == gguf_name(name)]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def best_in_brute_force(row: np.ndarray, importance: np.ndarray) -> float:
    """Least weighted error of one block of Q4_0 over many scales of both signs, in fp16."""
    reach = np.abs(row).max() / 4
    scales = np.linspace(-reach, reach, 4001).astype(np.float16).astype(np.float64)
    scales = scales[scales != 0][:, None]
    codes = np.clip(np.round(row / scales), -8, 7)
    return float((importance * (scales * codes - row) ** 2).sum(1).min())


def test_scales_are_the_optimum_of_the_diagonal(tmp_path: Path) -> None:
    means = importance()
    matrix = write(tmp_path / "i.gguf", means)
    damping = 0.01
    options = {"imatrix": matrix, "quantization.refine_rounds": 0, "runtime.llamacpp": "off"}
    report = deploy(trained_checkpoint("llama"), tmp_path / "out", {**options, "type": "Q4_0"})
    assert set(gate_statuses(report).values()) <= {"green", "not run"}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'tags: [gguf, quantized, "Q4_0", piso, imatrix]' in card
    W = open_checkpoint(str(trained_checkpoint("llama"))).read(DOWN).double().numpy()
    found = weights(tmp_path / "out", DOWN).astype(np.float64)
    h = means[gguf_name(DOWN)].astype(np.float64)
    h = h + damping * h.mean()
    loss = (h * (found - W) ** 2).reshape(len(W), -1, 32).sum(2)
    for r in range(0, len(W), 16):
        for g in range(loss.shape[1]):
            part = slice(32 * g, 32 * g + 32)
            assert loss[r, g] <= best_in_brute_force(W[r, part], h[part]) * (1 + 1e-6)


def source_and_recipe(matrix: str, **options: Any) -> tuple[Recipe, Source]:
    values = {"model": str(trained_checkpoint("llama")), "imatrix": matrix, **options}
    recipe = load_recipe(options=values).recipe
    return recipe, open_source(recipe, allow_pickle=False)


def refused(matrix: str, error: type[PipelineError], match: str | None, **options: Any) -> None:
    recipe, source = source_and_recipe(matrix, **options)
    with pytest.raises(error, match=match):
        importance_of(recipe, source)


def test_a_file_with_other_numbers_is_another_run(tmp_path: Path) -> None:
    first, same = (write(tmp_path / f"{n}.gguf", importance()) for n in "ab")
    other = write(tmp_path / "c.gguf", importance(1))
    digests = [
        identity_of_importance(importance_of(*source_and_recipe(m))) for m in (first, same, other)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_finished_blocks_are_taken_up_again(tmp_path: Path) -> None:
    recipe, source = source_and_recipe(write(tmp_path / "i.gguf", importance()))
    vectors = importance_of(recipe, source)
    models = []
    for _ in range(2):
        with RunDirectory(tmp_path / "run", {"x": 1}) as folder, open_progress("quiet") as progress:
            model = quantize_weighted(recipe, source, vectors, folder, progress)
            models.append((model.read(DOWN), model.sites, model.importance()[DOWN]))
    assert torch.equal(models[0][0], models[1][0])
    assert models[0][1] == models[1][1]
    assert len(models[0][1]) == len(vectors)
    np.testing.assert_allclose(models[1][2].numpy(), vectors[DOWN], rtol=1e-6)


def test_what_does_not_belong_to_the_model_is_refused(tmp_path: Path) -> None:
    means = importance()
    missing = {name: v for name, v in means.items() if name != gguf_name(DOWN)}
    shorter = means | {gguf_name(DOWN): np.ones(3, np.float32)}
    matrix = write(tmp_path / "missing.gguf", missing)
    refused(matrix, InputError, "no entry for blk.1.ffn_down.weight")
    matrix = write(tmp_path / "shorter.gguf", shorter)
    refused(matrix, InputError, "3 inputs instead of 256")


def test_what_would_make_it_needless_is_refused(tmp_path: Path) -> None:
    matrix = write(tmp_path / "i.gguf", importance())
    refused(matrix, UsageError, "cannot be combined", emit=("imatrix",))


@pytest.mark.parametrize("key", ["calibration.gradient_weighting", "quantization.magr"])
def test_what_it_would_leave_without_effect_is_refused(key: str, tmp_path: Path) -> None:
    matrix = write(tmp_path / "i.gguf", importance())
    refused(matrix, UsageError, "leave one of the two out|cannot be combined", **{key: 0.5})


def test_weighted_means_are_not_written_as_an_importance_matrix() -> None:
    options = {"calibration.gradient_weighting": 0.5, "emit": ("imatrix",)}
    recipe = load_recipe(options={"model": str(trained_checkpoint("llama")), **options}).recipe
    with pytest.raises(UsageError, match="would be weighted"):
        importance_of(recipe, open_source(recipe, allow_pickle=False))


@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_numbers_that_are_no_squares_are_refused(value: float, tmp_path: Path) -> None:
    means = importance()
    means[gguf_name(DOWN)][5] = value
    refused(write(tmp_path / "i.gguf", means), InputError, "negative number")


def test_other_files_are_refused(tmp_path: Path) -> None:
    legacy, model = tmp_path / "imatrix.dat", tmp_path / "model.gguf"
    legacy.write_bytes(b"\x01\x00\x00\x00" * 8)
    refused(str(legacy), InputError, None)
    refused(str(tmp_path / "nowhere.gguf"), InputError, None)
    writer = gguf.GGUFWriter(model, arch="llama")
    writer.add_tensor("a", np.ones((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(str(model), InputError, "no importance matrix")


def test_a_matrix_that_no_token_reached_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_imatrix(path, {"a": np.ones(4, np.float32)}, tokens=0, chunk=1, dataset="x")
    assert read_imatrix(path) == {}
    write_imatrix(path, {"a": np.ones(4, np.float32)}, tokens=5, chunk=1, dataset="x")
    np.testing.assert_array_equal(read_imatrix(path)["a"], np.ones(4))
