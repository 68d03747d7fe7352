"""The training scripts, a few steps of them, on a CPU."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pipeline.checkpoint import load_tokenizer, open_checkpoint
from pipeline.demo import build_corpus
from pipeline.demo import train as training
from pipeline.demo.train import Plan, Sizes, build_model, held_out_loss, load_tokens, train
from tests.tiny import FAMILIES, trained_checkpoint

SMALL = Sizes(
    vocab=300, hidden=32, intermediate=48, layers=2, heads=2, kv_heads=1, head_dim=16, context=32
)


@pytest.fixture
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two modules to train on and one held out, so that a tokenizer takes no time."""
    modules = [("a.py", "def add(a, b):\n    return a + b\n" * 40), ("b.py", "x = 12345\n" * 90)]
    monkeypatch.setattr(build_corpus, "training_sources", lambda tests: modules)
    monkeypatch.setattr(build_corpus, "held_out_sources", lambda: [("c.py", "return x + a\n" * 80)])


@pytest.mark.usefixtures("small_library")
def test_the_corpus_is_whole_documents_between_marks(tmp_path: Path) -> None:
    build_corpus.main(["--out", str(tmp_path), "--vocabulary", "300"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = np.fromfile(tmp_path / "train.u16", dtype="<u2").tolist()
    assert ids[0] == tokenizer.token_to_id("<|begin_of_text|>") == 0
    assert ids[-1] == tokenizer.token_to_id("<|end_of_text|>") == 1
    assert (ids.count(0), ids.count(1)) == (2, 2)
    first = tokenizer.decode(ids[1 : ids.index(1)])
    assert first in ("def add(a, b):\n    return a + b\n" * 40, "x = 12345\n" * 90)
    assert max(ids) < tokenizer.get_vocab_size() <= 300


@pytest.mark.usefixtures("small_library")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_script_writes_a_model_that_opens(family: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "model"
    build_corpus.main(["--out", str(data), "--vocabulary", "300"])
    training.main(
        f"--data {data} --out {out} --arch {family} --device cpu --no-bfloat16"
        " --vocab 300 --hidden 32 --intermediate 48 --layers 2 --heads 2 --kv-heads 1"
        " --head-dim 16 --length 16 --batch 2 --epochs 0.1 --warmup 2".split()
    )
    checkpoint = open_checkpoint(out)
    assert checkpoint.architecture.model_type == family
    assert checkpoint.tied
    assert checkpoint.notes == ()
    assert checkpoint.nbytes == 2 * checkpoint.num_parameters, "bfloat16"
    assert load_tokenizer(checkpoint)("x = 1").input_ids[0] == 0


def test_training_learns_and_leaves_global_random_state_alone() -> None:
    tokens = torch.arange(4000) % 7 + 2
    state = torch.get_rng_state()
    model = build_model("llama", SMALL)
    before = held_out_loss(model, tokens, 16)
    plan = Plan(batch=4, length=16, epochs=2.0, seconds=math.inf, warmup=5, bfloat16=False)
    assert train(model, tokens, plan) == 2 * 4000 // 64
    assert torch.equal(torch.get_rng_state(), state)
    assert before == pytest.approx(math.log(300), abs=0.2)
    assert held_out_loss(model, tokens, 16) < 0.5 * before


def test_the_same_seed_gives_the_same_weights() -> None:
    plan = Plan(batch=2, length=8, epochs=0.1, seconds=math.inf, bfloat16=False)
    models = [build_model("qwen2", SMALL, seed) for seed in (3, 3, 4)]
    for model in models:
        train(model, torch.arange(1000) % 11, plan)
    same, twin, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, twin[name]) for name, value in same.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(same[name], other[name])


def test_bfloat16_works_on_a_cpu() -> None:
    model = build_model("qwen3", SMALL)
    plan = Plan(batch=2, length=8, epochs=0.1, seconds=math.inf, bfloat16=True)
    train(model, torch.arange(1000) % 11, plan)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_time_ends_a_run() -> None:
    plan = Plan(batch=2, length=8, epochs=1e9, seconds=0.2, bfloat16=False)
    assert train(build_model("llama", SMALL), torch.arange(1000) % 11, plan) > 1


def test_the_schedule_rises_holds_and_falls_to_its_floor() -> None:
    plan = Plan(learning_rate=1.0, warmup=200, hold=0.4, floor=0.03)
    assert plan.rate(0, 0.0) == pytest.approx(1 / 200)
    assert plan.rate(99, 0.1) == pytest.approx(0.5)
    assert plan.rate(500, 0.39) == 1.0
    assert plan.rate(900, 0.7) == pytest.approx(0.5 * 0.97 + 0.03)
    assert plan.rate(999, 1.0) == pytest.approx(0.03)


def test_tokens_survive_the_file(tmp_path: Path) -> None:
    ids = np.array([0, 1, 65535, 32768], dtype="<u2")
    ids.tofile(tmp_path / "x.u16")
    assert load_tokens(tmp_path / "x.u16").tolist() == ids.tolist()


def test_the_tiny_trained_model_knows_more_than_token_frequencies() -> None:
    from transformers import AutoModelForCausalLM

    from pipeline.calibration.batches import tokenize
    from pipeline.demo import corpus

    checkpoint = open_checkpoint(trained_checkpoint("llama"))
    ids = tokenize(load_tokenizer(checkpoint), corpus("evaluation", 30_000))
    frequencies = torch.bincount(ids, minlength=512).clamp_min(1).double()
    unigram = -(frequencies[ids] / frequencies.sum()).log().mean().item()
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    assert held_out_loss(model, ids, 128, windows=30) < unigram - 0.8
    assert trained_checkpoint("llama") == checkpoint.folder, "made once"
