"""Kept parts: sound or recomputed, of this very run, and held by one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from pipeline.errors import BusyError, InterruptedRunError, ResourceError, UsageError
from pipeline.run_directory import RunDirectory

from .faulty_fs import FaultyFs, Killed

IDENTITY = {"recipe.seed": 0, "inputs": ["ab", "cd"], "torch": "2.13"}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "q.codes": torch.randint(-8, 8, (6, 32), dtype=torch.int8, generator=generator),
        "q.d": torch.randn(6, 1, generator=generator),
        "empty": torch.zeros(0, 4, dtype=torch.float64),
        "half": torch.randn(3, generator=generator).half(),
    }


def assert_loads(run: RunDirectory, name: str, seed: int) -> None:
    loaded = run.load(name)
    assert loaded is not None
    assert loaded[0].keys() == tensors(seed).keys()
    for key, expected in tensors(seed).items():
        assert loaded[0][key].dtype == expected.dtype
        assert torch.equal(loaded[0][key], expected)
    assert loaded[1] == {"seed": seed}


def keep(path: Path, *seeds: int, identity: Any = IDENTITY) -> None:
    with RunDirectory(path, identity) as run:
        for seed in seeds:
            run.store(f"block-{seed:02d}", tensors(seed), {"seed": seed})


def part(path: Path, name: str) -> Path:
    (found,) = (path / "parts").glob(f"{name}.*")
    return found


def test_parts_come_back_bit_for_bit(tmp_path: Path) -> None:
    keep(tmp_path / "run", 0, 1)
    with RunDirectory(tmp_path / "run", dict(IDENTITY)) as run:
        assert run.names() == ["block-00", "block-01"]
        assert run.has("block-01")
        assert not run.has("block-02")
        assert run.load("block-02") is None
        assert_loads(run, "block-00", 0)
        assert_loads(run, "block-01", 1)
        assert run.dropped == 0


def test_views_and_transposed_tensors_are_stored_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    with RunDirectory(tmp_path / "run", IDENTITY) as run:
        run.store("x", {"column": whole[:, 1], "turned": whole.T, "row": whole[0]})
        loaded = run.load("x")
    assert loaded is not None
    assert torch.equal(loaded[0]["column"], torch.tensor([1.0, 5.0, 9.0]))
    assert torch.equal(loaded[0]["turned"], whole.T)


def test_storing_again_replaces(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", IDENTITY) as run:
        run.store("block-00", tensors(1), {"seed": 1})
        run.store("block-00", tensors(2), {"seed": 2})
        assert_loads(run, "block-00", 2)
        assert run.names() == ["block-00"]


def test_same_part_same_bytes(tmp_path: Path) -> None:
    keep(tmp_path / "a", 0)
    keep(tmp_path / "b", 0)
    a, b = part(tmp_path / "a", "block-00"), part(tmp_path / "b", "block-00")
    assert a.name == b.name
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("seed", range(25))
def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path, seed: int) -> None:
    keep(tmp_path / "run", 0, 1)
    file = part(tmp_path / "run", "block-00")
    data = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    bit = int(torch.randint(8 * len(data), (1,), generator=generator))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    heard: list[str] = []
    with RunDirectory(tmp_path / "run", IDENTITY, warn=heard.append) as run:
        assert run.load("block-00") is None
        assert not run.has("block-00")
        assert_loads(run, "block-01", 1)
        assert run.dropped == 1
    assert len(heard) == 1
    assert "block-00" in heard[0]


@pytest.mark.parametrize("damage", ["torn", "empty", "renamed", "two", "forged"])
def test_other_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    keep(tmp_path / "run", 0, 1)
    file = part(tmp_path / "run", "block-00")
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "renamed":
        digest = part(tmp_path / "run", "block-01").name.split(".")[1]
        file.rename(file.with_name(f"block-00.{digest}.safetensors"))
    elif damage == "two":
        file.with_name(f"block-00.{'0' * 64}.safetensors").write_bytes(file.read_bytes())
    else:
        file.write_bytes(save({"q.codes": torch.zeros(2)}, {"meta": "{}"}))
    with RunDirectory(tmp_path / "run", IDENTITY) as run:
        assert run.load("block-00") is None
        assert run.dropped == 1
        run.store("block-00", tensors(0), {"seed": 0})
        assert_loads(run, "block-00", 0)


def test_every_failing_change_of_a_store_keeps_the_other_parts(tmp_path: Path) -> None:
    keep(tmp_path / "counted", 0)
    fs = FaultyFs()
    with RunDirectory(tmp_path / "counted", IDENTITY, fs=fs) as run:
        run.store("block-01", tensors(1), {"seed": 1})
    assert fs.count >= 8
    for k in range(1, fs.count + 1):
        path = tmp_path / str(k)
        keep(path, 0)
        faulty = FaultyFs(k, torn=True)
        with pytest.raises(ResourceError), RunDirectory(path, IDENTITY, fs=faulty) as run:
            run.store("block-01", tensors(1), {"seed": 1})
        with RunDirectory(path, IDENTITY) as run:
            assert_loads(run, "block-00", 0)
            if run.load("block-01") is None:
                run.store("block-01", tensors(1), {"seed": 1})
            assert_loads(run, "block-01", 1)
            assert run.dropped == 0


def store_twice(path: Path, fs: FaultyFs) -> None:
    with RunDirectory(path, IDENTITY, fs=fs) as run:
        for seed in (3, 0):
            run.store("block-00", tensors(seed), {"seed": seed})


def test_a_kill_at_any_change_leaves_only_sound_parts(tmp_path: Path) -> None:
    fs = FaultyFs()
    store_twice(tmp_path / "counted", fs)
    for k in range(1, fs.count + 1):
        path = tmp_path / str(k)
        dead = FaultyFs(k, torn=True, dead=True, error=Killed)
        with pytest.raises(Killed):
            store_twice(path, dead)
        with RunDirectory(path, IDENTITY) as run:
            loaded = run.load("block-00")
            if loaded is not None:
                assert_loads(run, "block-00", loaded[1]["seed"])
            assert not list((path / "parts").glob(".*"))


def test_another_identity_is_refused_field_by_field(tmp_path: Path) -> None:
    keep(tmp_path / "run", 0)
    other = {**IDENTITY, "recipe.seed": 1, "numba": "0.68"}
    with pytest.raises(UsageError) as caught:
        keep(tmp_path / "run", identity=other)
    assert "recipe.seed: 0 there, 1 now" in caught.value.why
    assert "numba: None there, '0.68' now" in caught.value.why
    assert "inputs" not in caught.value.why
    assert "--fresh" in caught.value.fix
    keep(tmp_path / "run")  # unharmed


def test_fresh_starts_over(tmp_path: Path) -> None:
    keep(tmp_path / "run", 0)
    with RunDirectory(tmp_path / "run", {"other": 1}, fresh=True) as run:
        assert run.names() == []
    assert json.loads((tmp_path / "run" / "identity.json").read_text()) == {"other": 1}


def test_another_identity_is_fine_while_nothing_is_kept(tmp_path: Path) -> None:
    keep(tmp_path / "run")
    keep(tmp_path / "run", identity={"other": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_damaged_identity_is_refused(tmp_path: Path, text: str) -> None:
    keep(tmp_path / "run", 0)
    (tmp_path / "run" / "identity.json").write_text(text)
    with pytest.raises(UsageError, match="damaged"):
        keep(tmp_path / "run")


@pytest.mark.parametrize("fresh", [False, True])
def test_folders_of_others_are_left_alone(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(UsageError, match=r"thesis\.tex"),
        RunDirectory(tmp_path, IDENTITY, fresh=fresh),
    ):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_second_process_is_told_who_works_here(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline.run_directory import RunDirectory\n"
        f"with RunDirectory(Path(sys.argv[1]), {IDENTITY!r}):\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(BusyError, match=f"process {child.pid} "):
            keep(tmp_path / "run")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    keep(tmp_path / "run", 0)  # the lock of a dead process is no lock


def test_lock_is_given_back_after_a_failure(tmp_path: Path) -> None:
    keep(tmp_path / "run", 0)
    with pytest.raises(UsageError):
        keep(tmp_path / "run", identity={"other": 1})
    keep(tmp_path / "run")


def test_interrupt_is_resumable_once_a_part_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), RunDirectory(tmp_path / "run", IDENTITY):
        raise KeyboardInterrupt
    keep(tmp_path / "run", 0)
    with (
        pytest.raises(InterruptedRunError, match="1 finished parts"),
        RunDirectory(tmp_path / "run", IDENTITY),
    ):
        raise KeyboardInterrupt


def test_a_bug_leaves_its_traceback_and_says_what_is_kept(tmp_path: Path) -> None:
    keep(tmp_path / "run", 0)
    with pytest.raises(ZeroDivisionError) as caught, RunDirectory(tmp_path / "run", IDENTITY):
        _ = 1 / 0
    text = (tmp_path / "run" / "traceback.txt").read_text()
    assert "ZeroDivisionError" in text
    assert any("traceback.txt" in note for note in caught.value.__notes__)
    assert any("kept: 1 finished" in note for note in caught.value.__notes__)


def test_delete_leaves_nothing(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", IDENTITY) as run:
        run.store("block-00", tensors(0))
        run.delete()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a/b", "x" * 101])
def test_names_stay_inside_the_directory(tmp_path: Path, name: str) -> None:
    with RunDirectory(tmp_path / "run", IDENTITY) as run, pytest.raises(ValueError, match="name"):
        run.store(name, tensors(0))
