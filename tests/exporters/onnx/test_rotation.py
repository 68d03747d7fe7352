"""A rotation at run time whose inverse is merged: ONNX Runtime computes what it computed before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.onnx.rotation import KroneckerPair
from pipeline.errors import InputError
from pipeline.transforms.online import kronecker_pair
from pipeline.transforms.operators import hadamard_rotation
from tests.onnx_models import TinyModel, random_ids, run, session

DOWN = "mlp.down_proj.weight"


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return TinyModel("qwen2")


def write(tiny: TinyModel, folder: Path, pair: KroneckerPair) -> Path:
    """The model with the rotation at run time and its inverse in every down_proj."""
    matrix = torch.from_numpy(np.kron(*pair)).double()
    merged: dict[str, np.ndarray] = {}
    entries = []
    for entry in tiny.entries:
        if entry.name.endswith(DOWN):
            weight = tiny.torch.get_parameter(entry.name).detach().double()
            blocks = weight.reshape(len(weight), -1, len(matrix)) @ matrix.T
            merged[entry.name] = blocks.reshape(weight.shape).float().numpy()
            entry = replace(entry, read=lambda name=entry.name: merged[name])
        entries.append(entry)
    whole, tiny.entries = tiny.entries, entries
    try:
        return tiny.write(folder, inner_rotation=pair)
    finally:
        tiny.entries = whole


@pytest.mark.parametrize("block", [2, 16, 32, 64, 128])
def test_logits_stay(block: int, tiny: TinyModel, tmp_path: Path) -> None:
    """Blocks up to 64 take one product, 128 is 2 x 64."""
    rotation = hadamard_rotation(128, block, torch.Generator().manual_seed(1), signs=False)
    pair = kronecker_pair(rotation)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    X = x.reshape(5, 128 // block, len(pair[0]), len(pair[1])).numpy()
    torch.testing.assert_close(
        torch.from_numpy(pair[0] @ X @ pair[1].T).reshape(5, 128).double(),
        rotation.forward(x),
        rtol=1e-6,
        atol=1e-6,
    )
    path = write(tiny, tmp_path, pair)
    ids = random_ids(2, 12)
    logits, cache = run(session(path), ids[:, :8])
    more, _ = run(session(path), ids[:, 8:], np.ones_like(ids), cache)
    wanted = tiny.logits(ids)
    for found, reference in ((logits, wanted[:, :8]), (more, wanted[:, 8:])):
        assert np.abs(found - reference).max() < 2e-4 * np.abs(wanted).max()


def test_without_the_inverse_logits_change(tiny: TinyModel, tmp_path: Path) -> None:
    rotation = hadamard_rotation(128, 16, torch.Generator().manual_seed(1), signs=False)
    path = tiny.write(tmp_path, inner_rotation=kronecker_pair(rotation))
    ids = random_ids(1, 8)
    difference = np.abs(run(session(path), ids)[0] - tiny.logits(ids)).max()
    assert difference > 0.05 * np.abs(tiny.logits(ids)).max()


def test_what_is_no_rotation_is_refused(tiny: TinyModel, tmp_path: Path) -> None:
    one = np.ones((1, 1), np.float32)
    with pytest.raises(InputError, match="blocks of 24"):
        tiny.write(tmp_path, inner_rotation=(one, np.eye(24, dtype=np.float32)))
    with pytest.raises(InputError, match="not orthogonal"):
        tiny.write(tmp_path, inner_rotation=(one, np.ones((16, 16), np.float32)))
    with pytest.raises(InputError, match="not orthogonal"):
        tiny.write(tmp_path, inner_rotation=(one, np.ones((16, 1), np.float32)))


def test_signs_belong_into_the_weights() -> None:
    rotation = hadamard_rotation(32, 16, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="up_proj"):
        kronecker_pair(rotation)
