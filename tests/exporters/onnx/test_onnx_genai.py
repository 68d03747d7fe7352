"""onnxruntime-genai loads the folder and generates what ONNX Runtime itself generates.

Needs the extra ``genai``. Its runtime lives beside every version of transformers; only its model
builder, which nothing here uses, asks for transformers 5.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtimes.onnxruntime import OnnxRuntime
from tests.onnx_models import EMBEDDING, HEAD, TinyModel, random_ids
from tests.tiny import FAMILIES, tiny_tokenizer

NEW = 12


@pytest.mark.parametrize("attention", ["standard", "gqa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens(family: str, attention: str, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra genai")
    kinds = {EMBEDDING: "F16", HEAD: "F16"}
    model = TinyModel(family, lambda name: kinds.get(name, "INT4_G32"), eos_token_id=511)
    path = model.write(tmp_path, attention=attention)
    tiny_tokenizer(family).save(str(tmp_path / "tokenizer.json"))
    (prompt,) = random_ids(1, 9, seed=4)
    # The folder's genai_config asks for exact products, as all integers have 4 bits.
    wanted = OnnxRuntime(path, threads=1).greedy(prompt.tolist(), NEW)
    assert 511 not in wanted
    loaded = genai.Model(str(tmp_path))
    settings = genai.GeneratorParams(loaded)
    settings.set_search_options(do_sample=False, max_length=len(prompt) + NEW)
    generator = genai.Generator(loaded, settings)
    generator.append_tokens(np.asarray(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[len(prompt) :].tolist() == wanted
