"""Optimum's ORTModelForCausalLM loads the folder and generates what transformers generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.onnx_models import EMBEDDING, HEAD, TinyModel, random_ids
from tests.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_a_left_padded_batch(family: str, tmp_path: Path) -> None:
    optimum = pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum")
    kinds = {EMBEDDING: "F16", HEAD: "F16"}
    model = TinyModel(family, lambda name: kinds.get(name, "INT4_G32"))
    model.write(tmp_path)
    model.torch.config.save_pretrained(tmp_path)
    model.torch.generation_config.save_pretrained(tmp_path)
    options = session_options()
    loaded = optimum.ORTModelForCausalLM.from_pretrained(tmp_path, session_options=options)
    ids, mask = torch.from_numpy(random_ids(2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = loaded.generate(input_ids=ids, attention_mask=mask, **settings)
    wanted = model.torch.generate(input_ids=ids, attention_mask=mask, **settings)
    assert found.shape == (2, 34)
    assert torch.equal(found, wanted)


def session_options() -> object:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options
