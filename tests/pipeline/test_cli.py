"""The command line: help, exit codes, messages, and what reaches `pipeline.run`."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline
from pipeline import errors
from pipeline.cli import app, main
from pipeline.cli_help import EXAMPLES, PROGRAM
from pipeline.report import Gate, Report, Status
from pipeline.run_directory import RunDirectory

DEMO = Path(pipeline.__file__).parent / "demo" / "model"


class StubRun(types.ModuleType):
    """Stands for `pipeline.run` and `pipeline.reexport`: records the call, then returns `report` or
    raises `error`."""

    def __init__(self) -> None:
        super().__init__("pipeline.run")
        self.report = Report(gates=(Gate("twin", "claim", "runtime", 0.5, "< 1", "green"),))
        self.error: BaseException | None = None
        self.calls: list[dict[str, Any]] = []

    def _called(self, **arguments: Any) -> Report:
        self.calls.append(arguments)
        arguments["progress"].stage("load", 1, 1)
        if self.error is not None:
            raise self.error
        return self.report

    def deploy(self, recipe: Any, **arguments: Any) -> Report:
        return self._called(recipe=recipe.recipe, **arguments)

    def plan(self, recipe: Any, **arguments: Any) -> dict[str, tuple[str, int]]:
        self.calls.append(arguments | {"recipe": recipe.recipe})
        return {"output.weight": ("Q6_K", 1234567)}

    def verify(self, folder: Path, **arguments: Any) -> Report:
        return self._called(folder=folder, **arguments)

    def reexport(self, folder: Path, target: str, **arguments: Any) -> Report:
        return self._called(folder=folder, target=target, **arguments)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> StubRun:
    stub = StubRun()
    monkeypatch.setitem(sys.modules, "pipeline.run", stub)
    monkeypatch.setattr(pipeline, "run", stub, raising=False)
    monkeypatch.setitem(sys.modules, "pipeline.reexport", stub)
    monkeypatch.setattr(pipeline, "reexport", stub, raising=False)
    return stub


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call


Invoke = Callable[..., tuple[int, str, str]]


def python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_is_quick_and_teaches(command: str) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = python("-m", "pipeline", *command.split(), "--help")
        seconds.append(time.perf_counter() - start)
    print(f"{command or 'program'} --help: {min(seconds):.2f} s")  # noqa: T201
    assert min(seconds) < 1.5
    assert done.returncode == 0
    assert done.stderr == ""
    for arguments, _ in EXAMPLES[command]:
        assert f"  {PROGRAM} {arguments}\n" in done.stdout
    for code, meaning in errors.EXIT_CODES.items():
        assert f"{code:>5}  {meaning}" in done.stdout


@pytest.mark.parametrize("command", EXAMPLES)
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from pipeline.cli import main\n"
        f"try: main({[*command.split(), '--help']!r})\n"
        "except SystemExit: pass\n"
        # Not pydantic: recent versions of typer import it on their own account.
        "heavy = {'torch', 'numpy', 'transformers', 'datasets', 'pipeline.recipe'}\n"
        "heavy &= sys.modules.keys()\n"
        "sys.exit(', '.join(heavy) or None)"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def examples() -> Iterator[list[str]]:
    for command_examples in EXAMPLES.values():
        for arguments, _ in command_examples:
            yield arguments.split(">")[0].split()


def compared(files: list[Path], **_: Any) -> list[Any]:
    """Stands for a comparison of files that are not there; `tests/runtimes` runs a real one."""
    from pipeline.stages.compare import Compared
    from runtimes.metrics import ComparisonAccumulator

    accumulator, logits = ComparisonAccumulator(1), torch.randn(4, 8)
    accumulator.update(logits, logits, torch.arange(4))
    return [Compared(path, 1000, 4.5, accumulator.result(), None) for path in files]


@pytest.mark.parametrize("arguments", list(examples()), ids=" ".join)
def test_examples_run(
    arguments: list[str],
    run: StubRun,
    invoke: Invoke,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text("seed = 4\n")
    for folder in ("out", "my-model"):
        (tmp_path / folder).mkdir()
        for name in ("model.safetensors", "model.gguf"):
            (tmp_path / folder / name).write_bytes((DEMO / "model.safetensors").read_bytes())
    monkeypatch.setattr("pipeline.stages.compare.compare", compared)
    code, out, err = invoke(*arguments)
    assert code == 0, err
    assert "error" not in err
    assert out.strip()
    runs = arguments[0] in ("deploy", "verify", "export")
    assert bool(run.calls) == (runs and "--help" not in arguments)


def test_every_command_has_examples() -> None:
    assert {command.callback.__name__ for command in app.registered_commands} == {
        name for name in EXAMPLES if name
    }  # type: ignore[union-attr]


def test_every_option_reaches_the_run(run: StubRun, invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke(
        "deploy", "my/model", "--revision", "v1", "--target", "gguf", "--type", "q2_0",
        "--output", tmp_path / "out", "--calibration", "c.txt", "--evaluation", "e.txt",
        "--samples", "3", "--seqlen", "32", "--preset", "best", "--set", "quantization.damping=0.5",
        "--set", "gates.twin=1e-3", "--token-embedding-type", "Q6_K", "--output-tensor-type", "F16",
        "--pure", "--emit", "imatrix", "--emit", "kld-base", "--imatrix", "i.gguf",
        "--transform", "rotate:seed=1", "--transform", "permute",
        "--tensor-type", "ffn_down=q6_k", "--tensor-type", "attn=Q8_0",
        "--seed", "9", "--allow-fallback", "--allow-pickle", "--overwrite", "--fresh",
        "--runtime", "require", "--run-dir", tmp_path / "run", "--progress", "quiet",
    )  # fmt: skip
    assert code == 0, err
    (call,) = run.calls
    expected = {
        "model": "my/model", "revision": "v1", "type": "Q2_0", "token_embedding_type": "Q6_K",
        "output_tensor_type": "F16", "allow_fallback": True, "seed": 9,
        "pure": True, "emit": ("imatrix", "kld-base"), "imatrix": "i.gguf",
        "transforms": ("rotate:seed=1", "permute"),
        "tensor_types": ("ffn_down=Q6_K", "attn=Q8_0"),
        "calibration.source": "c.txt", "calibration.samples": 3, "calibration.seqlen": 32,
        "calibration.mismatch": 1.0, "evaluation.source": "e.txt", "quantization.damping": 0.5,
        "gates.twin": 1e-3, "runtime.llamacpp": "require",
    }  # fmt: skip
    values = call["recipe"].flat()
    assert {key: values[key] for key in expected} == expected
    assert (call["output"], call["run_dir"]) == (tmp_path / "out", tmp_path / "run")
    assert call["overwrite"] is call["fresh"] is call["allow_pickle"] is True
    assert call["command"].startswith(PROGRAM)


@pytest.mark.parametrize(
    ("option", "key", "value", "folder"),
    [
        (("--target-size", "14.5MB"), "target_size", 14_500_000, "demo-14500KB-gguf"),
        (("--target-bpw", "3.25"), "target_bpw", 3.25, "demo-3.25bpw-gguf"),
    ],
)
def test_a_budget_reaches_the_run(
    option: tuple[str, str], key: str, value: float, folder: str, run: StubRun, invoke: Invoke
) -> None:
    for extra in ((), ("--dry-run",)):
        assert invoke("deploy", *option, *extra)[0] == 0
    for call in run.calls:
        assert call["recipe"].flat()[key] == value
        assert call["output"] == Path(folder)
        assert "progress" in call


def test_a_dry_run_prints_types_and_bytes_and_writes_nothing(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke("deploy", "--type", "Q4_K_M", "--dry-run", "--progress", "quiet")
    assert code == 0, err
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if ".weight" in line}
    assert rows["token_embd.weight"][0] == "Q6_K"
    assert rows["blk.3.ffn_down.weight"] == ["Q6_K", f"{256 * 768 // 256 * 210:,}"]
    assert rows["blk.0.attn_norm.weight"] == ["F32", "1,024"]
    assert list(tmp_path.iterdir()) == []


def test_defaults_of_a_bare_deploy(run: StubRun, invoke: Invoke) -> None:
    assert invoke("deploy", "--target", "gguf")[0] == 0
    (call,) = run.calls
    assert call["recipe"].model is None
    assert call["output"] == Path("demo-Q4_0-gguf")
    assert call["run_dir"] is None
    assert call["overwrite"] is call["fresh"] is call["allow_pickle"] is False


def test_output_is_named_after_the_model_and_type(run: StubRun, invoke: Invoke) -> None:
    invoke("deploy", "org/name", "--type", "Q2_0")
    assert run.calls[0]["output"] == Path("name-Q2_0-gguf")


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--bits", "3"], "INT3_G32"),
        (["--bits", "2", "--group-size", "128", "--symmetric"], "INT2_G128"),
        (["--group-size", "64"], "INT4_G64"),
        (["--symmetric"], "INT4_G32"),
        (["--asymmetric", "--bits", "2"], "UINT2_G64"),
    ],
)
def test_bits_group_size_and_symmetry_compose_the_type(
    options: list[str], kind: str, run: StubRun, invoke: Invoke
) -> None:
    code, _, err = invoke("deploy", "--target", "onnx", "--attention", "gqa", *options)
    assert code == 0, err
    (call,) = run.calls
    assert call["recipe"].type == kind
    assert call["recipe"].onnx.attention == "gqa"
    assert call["output"] == Path(f"demo-{kind}-onnx")


def test_a_type_beside_bits_is_refused_but_one_in_a_file_gives_way(
    run: StubRun, invoke: Invoke, tmp_path: Path
) -> None:
    for given in (["--type", "Q4_0"], ["--set", "type=Q4_0"]):
        code, _, err = invoke("deploy", "--target", "onnx", "--bits", "4", *given)
        assert code == 2
        assert "type Q4_0 and --bits" in err
    assert run.calls == []
    (tmp_path / "r.toml").write_text('target = "onnx"\ntype = "INT2_G32"\n')
    assert invoke("deploy", "--recipe", tmp_path / "r.toml", "--bits", "3")[0] == 0
    assert run.calls[0]["recipe"].type == "INT3_G32"


def test_export_passes_its_arguments(run: StubRun, invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke(
        "export", tmp_path / "done", "--target", "onnx", "--attention", "primitive", "--model",
        "elsewhere", "--overwrite", "--allow-pickle", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    (call,) = run.calls
    expected = {
        "folder": tmp_path / "done", "target": "onnx", "attention": "primitive",
        "model": "elsewhere", "overwrite": True, "allow_pickle": True, "output": tmp_path / "out",
    }  # fmt: skip
    assert {key: call[key] for key in expected} == expected
    assert call["command"].startswith(PROGRAM)
    assert invoke("export", tmp_path / "done", "--target", "gguf,onnx")[0] == 0
    assert run.calls[1]["output"] == Path("done-gguf-onnx")
    assert invoke("export", tmp_path / "done")[0] == 2


def test_verify_passes_its_arguments(run: StubRun, invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("verify", tmp_path, "--model", "elsewhere")[0] == 0
    assert run.calls[0]["folder"] == tmp_path
    assert run.calls[0]["model"] == "elsewhere"


EXPECTED = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.PipelineError)
]


@pytest.mark.parametrize(
    "command",
    [("deploy",), ("verify", "x"), ("export", "x", "--target", "onnx")],
    ids=["deploy", "verify", "export"],
)
@pytest.mark.parametrize("kind", EXPECTED)
def test_expected_errors_have_their_code_and_no_traceback(
    kind: type[errors.PipelineError], command: tuple[str, ...], run: StubRun, invoke: Invoke
) -> None:
    run.error = kind("it broke", why="too much load", fix="carry less")
    run.error.add_note("kept: 3 blocks")
    code, _, err = invoke(*command, "--progress", "quiet")
    assert code == kind.exit_code
    message = ["error: it broke", "  why: too much load", "  fix: carry less", "  kept: 3 blocks"]
    assert err.splitlines() == message


def test_debug_shows_the_traceback(run: StubRun, invoke: Invoke) -> None:
    run.error = errors.InputError("it broke")
    code, _, err = invoke("deploy", "--debug")
    assert code == 10
    assert "Traceback" in err
    assert err.endswith("error: it broke\n")


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (ValueError("oops"), 1, ["internal error: ValueError: oops", "Traceback", "bug"]),
        (MemoryError(), 12, ["out of memory", "calibration.batch"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 12, ["out of memory"]),
        (OSError(errno.ENOSPC, "No space left", "/f"), 12, ["cannot use /f", "free disk space"]),
        (OSError(errno.ENOENT, "No such file", "/f"), 1, ["internal error: FileNotFoundError"]),
        (KeyboardInterrupt(), 130, ["nothing to resume"]),
    ],
)
def test_other_ends(
    error: BaseException, code: int, parts: list[str], run: StubRun, invoke: Invoke
) -> None:
    run.error = error
    found, _, err = invoke("deploy")
    assert found == code
    assert all(part in err for part in parts), err


def test_out_of_memory_on_an_accelerator(run: StubRun, invoke: Invoke) -> None:
    run.error = type("OutOfMemoryError", (RuntimeError,), {})("tried to allocate 2 GiB\nmore")
    code, _, err = invoke("deploy")
    assert code == 12
    assert "why: tried to allocate 2 GiB\n" in err


def test_bug_with_a_saved_traceback_is_short(
    run: StubRun, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deploy(recipe: Any, **arguments: Any) -> Report:
        with RunDirectory(tmp_path / "run", {}):
            raise ZeroDivisionError("division")

    monkeypatch.setattr(run, "deploy", deploy)
    code, _, err = invoke("deploy")
    assert code == 1
    assert "Traceback" not in err
    assert f"traceback: {tmp_path / 'run' / 'traceback.txt'}" in err
    assert "ZeroDivisionError" in (tmp_path / "run" / "traceback.txt").read_text()


@pytest.mark.parametrize(
    ("level", "status", "code"),
    [("twin", "green", 0), ("twin", "not run", 0), ("twin", "red", 14), ("quality", "red", 3)],
)
def test_gates_decide_the_exit_code(
    level: str, status: Status, code: int, run: StubRun, invoke: Invoke
) -> None:
    run.report = Report(gates=(Gate(level, "claim", "llama.cpp", 0.5, "< 1", status),))
    found, out, _ = invoke("deploy")
    assert found == code
    assert "Parity ladder" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["deploy", "--type", "Q4_O"], ["did you mean Q4_0?"]),
        (["deploy", "--target-size", "15XB"], ["no size such as 15MB"]),
        (["deploy", "--target-size", "1MB", "--target-bpw", "3"], ["target_size is given too"]),
        (["deploy", "--target-size", "1MB", "--type", "Q4_0"], ["type is given too"]),
        (["deploy", "--target-bpw", "3", "--pure"], ["pure is given too"]),
        (["deploy", "--target", "onnx", "--type", "Q4_K_M"], ["ONNX cannot hold the mix Q4_K_M"]),
        (["deploy", "--target", "onnx", "--bits", "5"], ["2, 3, 4 or 8 bits"]),
        (["deploy", "--target", "gguf,onnx", "--bits", "3"], ["GGUF has no such type"]),
        (["deploy", "--attention", "gqs"], ["did you mean gqa?"]),
        (["deploy", "--target", "ggfu"], ["did you mean gguf?"]),
        (["deploy", "--preset", "bset"], ["did you mean best?"]),
        (["deploy", "--runtime", "requir"], ["did you mean require?"]),
        (["deploy", "--progress", "plian"], ["did you mean plain?"]),
        (["deploy", "--samples", "0"], ["greater than or equal to 1", "command line"]),
        (["deploy", "--samples", "x"], ["--samples"]),
        (["deploy", "--sampels", "3"], ["--samples"]),
        (["deploy", "--set", "samples=1"], ["did you mean calibration.samples?"]),
        (["recipe", "--recipe", "absent.toml"], ["cannot read the recipe absent.toml"]),
        (["ls", "type"], ["did you mean types?"]),
        (["ls"], ["KIND"]),
        (["deplyo"], ["deploy"]),
    ],
)
def test_usage_errors(arguments: list[str], parts: list[str], run: StubRun, invoke: Invoke) -> None:
    code, _, err = invoke(*arguments)
    assert code == 2
    assert all(part in err for part in parts), err
    assert "Traceback" not in err
    assert run.calls == []


@pytest.mark.parametrize(
    ("report", "error", "code"),
    [
        (Report(notes=("fine",)), None, 0),
        (Report(gates=(Gate("twin", "c", "r", 1.0, "l", "red"),)), None, 14),
        (Report(), errors.InputError("bad", fix="better"), 10),
        (Report(), KeyboardInterrupt(), 130),
    ],
)
def test_json_progress_ends_with_a_summary(
    report: Report, error: BaseException | None, code: int, run: StubRun, invoke: Invoke
) -> None:
    run.report, run.error = report, error
    found, _, err = invoke("deploy", "--progress", "json")
    told = [json.loads(line) for line in err.splitlines()]
    assert [event["event"] for event in told][-1] == "summary"
    assert found == told[-1]["exit_code"] == code
    assert ("error" in told[-1]) == (error is not None)


@pytest.mark.parametrize(("parts_kept", "code"), [(0, 130), (1, 75)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_and_say_whether_it_resumes(
    tmp_path: Path, number: int, parts_kept: int, code: int
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time, types, torch; from pathlib import Path\n"
        "from pipeline.cli import main; from pipeline.run_directory import RunDirectory\n"
        "def deploy(recipe, **rest):\n"
        "    with RunDirectory(Path(sys.argv[1]), {}) as run:\n"
        f"        if {parts_kept}: run.store('block-00', dict(x=torch.ones(2)))\n"
        "        print('ready', flush=True); time.sleep(60)\n"
        "stub = types.ModuleType('pipeline.run'); stub.deploy = deploy\n"
        "import pipeline; pipeline.run = sys.modules['pipeline.run'] = stub\n"
        "main(['deploy', '--progress', 'quiet'])\n"
    )
    child = subprocess.Popen(
        [sys.executable, script, tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        _, err = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == code
    assert ("the same command" in err) == (code == 75)
    assert "Traceback" not in err


def test_recipe_prints_a_recipe_that_deploy_accepts(
    run: StubRun, invoke: Invoke, tmp_path: Path
) -> None:
    _, text, _ = invoke("recipe", "m/m", "--preset", "best", "--set", "seed=3", "--samples", "4")
    assert "seed = 3  # --set\n" in text
    assert "samples = 4  # command line\n" in text
    assert "mismatch = 1.0  # preset best\n" in text
    assert "batch = 8  # default\n" in text
    (tmp_path / "r.toml").write_text(text)
    invoke("deploy", "--recipe", tmp_path / "r.toml", "--preset", "fast")
    recipe = run.calls[0]["recipe"]
    assert (recipe.model, recipe.seed, recipe.calibration.mismatch) == ("m/m", 3, 1.0)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("types", ["Q4_0", "4.5 bits per weight", "F32", "INT2_G<group>", "32, 64, 128"]),
        ("presets", ["fast", "balanced", "best"]),
        ("architectures", ["llama", "Qwen3ForCausalLM"]),
        ("runtimes", ["torch", "emulator", "llama.cpp", "onnxruntime"]),
    ],
)
def test_ls(kind: str, parts: list[str], invoke: Invoke) -> None:
    code, out, _ = invoke("ls", kind)
    assert code == 0
    assert all(part in out for part in parts)


def test_inspect_names_tensors_and_refuses_the_rest(invoke: Invoke, tmp_path: Path) -> None:
    code, out, _ = invoke("inspect", DEMO / "model.safetensors")
    assert code == 0
    assert "model.layers.3.mlp.up_proj.weight" in out
    assert "16.000" in out
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 16)
    assert invoke("inspect", tmp_path / "x.gguf")[0] == 10
    assert invoke("inspect", tmp_path / "absent.gguf")[0] == 10


def test_closed_pipe_is_no_bug() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "recipe"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in done.stderr


def test_full_disk_on_standard_output() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "recipe"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode not in (0, 1)
