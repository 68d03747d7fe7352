"""`compare` on files that llama.cpp's own quantizer made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError, UsageError
from pipeline.progress import open_progress
from pipeline.stages.compare import compare
from runtimes.llamacpp import LlamaCpp, quantize

pytest.importorskip("llama_cpp")


def test_files_are_ranked_against_the_first(demo_gguf: Path, tmp_path: Path) -> None:
    files = [demo_gguf, tmp_path / "q8.gguf", tmp_path / "q4.gguf"]
    for path, kind in zip(files[1:], ("Q8_0", "Q4_0"), strict=True):
        quantize(demo_gguf, path, kind, pure=True)
    with open_progress("quiet") as progress:
        found = compare(files, context=128, chunks=6, progress=progress)
    assert [one.size_bytes for one in found] == [path.stat().st_size for path in files]
    divergences = [one.comparison.kld_mean for one in found]
    assert divergences[0] == pytest.approx(0, abs=1e-12)
    assert divergences[0] < divergences[1] < divergences[2]
    assert 31 < found[0].bits_per_weight <= 32
    assert 8 < found[1].bits_per_weight < 9
    assert all(one.tokens_per_second is not None for one in found)


def test_what_cannot_be_compared_is_refused(
    demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_progress("quiet") as progress:
        with pytest.raises(UsageError, match="nothing to compare"):
            compare([demo_gguf], progress=progress)
        with pytest.raises(InputError, match="nowhere"):
            compare([demo_gguf, tmp_path / "nowhere.gguf"], progress=progress)
        answers = iter(([1, 2, 3], [1, 2, 3], [1, 2]))
        monkeypatch.setattr(LlamaCpp, "tokenize", lambda self, text: next(answers))
        with pytest.raises(InputError, match="tokenize differently"):
            compare([demo_gguf, demo_gguf], progress=progress)
