"""A trained model small enough to run, as Hugging Face model and as F32 GGUF file."""

from __future__ import annotations

import inspect
import json.decoder
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_file import MODEL, write_gguf


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as F32 GGUF file with its tokenizer."""
    pytest.importorskip("llama_cpp")
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def truncated_gguf(demo_gguf: Path, tmp_path: Path) -> Path:
    """A GGUF file cut in the middle of its tensors."""
    path = tmp_path / "truncated.gguf"
    shutil.copyfile(demo_gguf, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return path


@pytest.fixture(scope="session")
def demo_ids() -> list[int]:
    """Some 3000 tokens of the kind of text that the demo model knows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL, model_max_length=10**9)
    ids: list[int] = tokenizer(inspect.getsource(json.decoder))["input_ids"]
    return ids


@pytest.fixture(scope="session")
def demo_model() -> Any:
    """The demo model in transformers, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
