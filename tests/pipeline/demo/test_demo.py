"""The embedded model is what its card says, and its corpus never mixes held-out modules in."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from pipeline.calibration.batches import prepended_bos, sample_windows, tokenize
from pipeline.checkpoint import hf_config, load_tokenizer, open_checkpoint
from pipeline.demo import MODEL, corpus
from pipeline.demo.stdlib import HELD_OUT, held_out_sources, shuffled, training_sources
from pipeline.demo.train import held_out_loss
from pipeline.errors import InputError, UsageError


def test_the_model_is_what_its_card_says() -> None:
    from transformers import LlamaForCausalLM

    checkpoint = open_checkpoint(MODEL)
    assert (checkpoint.num_parameters, checkpoint.tied, checkpoint.notes) == (4_196_608, True, ())
    tokenizer = load_tokenizer(checkpoint)
    assert prepended_bos(tokenizer) == 0
    ids = tokenize(tokenizer, corpus("evaluation", 120_000))
    windows = sample_windows(ids, samples=24, length=1024, seed=0, bos_id=0).tokens
    model = LlamaForCausalLM(hf_config(checkpoint)).eval()
    model.load_state_dict({n: checkpoint.read(n) for n in checkpoint.shapes}, strict=False)
    model.tie_weights()
    with torch.no_grad():
        loss = held_out_loss(model, windows.flatten(), length=1023, windows=24)
    assert 2.2 < loss < 3.2  # 2.67 over all held-out modules; the sample differs by Python version


def test_splits_share_no_module_and_no_long_line() -> None:
    calibration, evaluation = (corpus(split, 10**9) for split in ("calibration", "evaluation"))
    assert len(calibration) > 2_000_000
    assert len(evaluation) > 500_000
    trained = {path for path, _ in training_sources(tests=True)}
    held_out = {path for path, _ in held_out_sources()}
    assert held_out <= set(HELD_OUT)
    assert not trained & held_out
    for name in HELD_OUT:
        stem = name.removesuffix(".py")
        assert not [path for path in trained if path.split("/")[0] in (stem, name)]
        assert f"test/test_{name}" not in trained
    for _, text in held_out_sources():
        assert text in evaluation
        assert text not in calibration


def test_tests_are_left_out_on_demand() -> None:
    without = {path for path, _ in training_sources(tests=False)}
    assert not [path for path in without if path.startswith("test/")]
    assert without <= {path for path, _ in training_sources(tests=True)}


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_the_corpus_is_the_same_in_every_process(split: str) -> None:
    code = (
        "import hashlib; from pipeline.demo import corpus\n"
        f"print(hashlib.sha256(corpus({split!r}, 300_000).encode()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_shuffling_changes_the_order_and_nothing_else() -> None:
    sources = [(str(i), "x") for i in range(50)]
    assert shuffled(sources) != sources
    assert sorted(shuffled(sources)) == sorted(sources)
    assert shuffled(sources) == shuffled(sources)
    assert shuffled(sources, seed=1) != shuffled(sources, seed=2)


def test_a_limit_keeps_whole_lines_from_the_start() -> None:
    whole = corpus("evaluation", 10**9)
    part = corpus("evaluation", 1234)
    assert whole.startswith(part)
    assert part.endswith("\n")
    assert 1000 < len(part) <= 1234


def test_a_limit_that_holds_no_line_is_refused() -> None:
    with pytest.raises(UsageError, match="no line"):
        corpus("evaluation", 0)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UsageError, match="test"):
        corpus("test")  # type: ignore[arg-type]


def test_a_python_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zipfile.pyc").write_bytes(b"compiled")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    for split in ("calibration", "evaluation"):
        with pytest.raises(InputError, match="no sources"):
            corpus(split)


def test_packages_and_installed_code_follow_the_same_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["os.py", "json/decoder.py", "distutils/cmd.py"]
    dropped = [
        "zipfile/__init__.py",
        "zipfile/_path/glob.py",
        "test/test_zipfile.py",
        "test/test_zipfile/test_core.py",
        "distutils/tests/test_cmd.py",
        "statistics.py",
        "site-packages/torch/x.py",
        "encodings/cp037.py",
        "lib2to3/tests/data/x.py",
    ]
    for path in kept + dropped:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"# {path}\n" * 200)
    (tmp_path / "short.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert [path for path, _ in training_sources(tests=True)] == sorted(kept)
    assert [path for path, _ in held_out_sources()] == ["statistics.py"]
