"""Speed and memory of an ONNX decoder, measured in a process of its own.

Run as ``python -m runtimes.onnxruntime_speed MODEL MODE PROMPT NEW THREADS`` it prints the figures
as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ResourceError, VerificationError
from runtimes.llamacpp_process import child_environment

PROMPT_TOKENS, NEW_TOKENS = 128, 32


@dataclass(frozen=True)
class Speed:
    """How fast a model ran, and what it took.

    Attributes:
        load_seconds: Until the session was ready.
        prompt_tokens_per_second: Evaluation of a prompt; best of three.
        new_tokens_per_second: Generation, one token at a time.
        memory_bytes: Resident memory that the session and the runs added; 0 where the system does
            not tell.
    """

    load_seconds: float
    prompt_tokens_per_second: float
    new_tokens_per_second: float
    memory_bytes: int


def measure(
    model: Path,
    mode: str = "default",
    *,
    prompt: int = PROMPT_TOKENS,
    new: int = NEW_TOKENS,
    threads: int = 0,
    time_limit: float = 1800,
) -> Speed:
    """Load a model and generate with it in a child process.

    Args:
        model: ONNX file.
        mode: As of `runtimes.onnxruntime.OnnxRuntime`.
        prompt: Tokens of the prompt, 2 at least.
        new: Tokens to generate after it, 2 at least.
        threads: CPU threads; 0 for all that this process may use.
        time_limit: Seconds that the child may take.

    Raises:
        ResourceError: The child could not be started.
        VerificationError: It failed, or took too long.
    """
    arguments = [str(model), mode, str(prompt), str(new), str(threads)]
    try:
        done = subprocess.run(
            # -P: a file numpy.py in the user's directory must not become ours.
            [sys.executable, "-P", "-m", "runtimes.onnxruntime_speed", *arguments],
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=time_limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(
            f"ONNX Runtime took more than {time_limit:g} s on {model.name}",
            fix="raise --set runtime.time_limit_s",
        ) from error
    except OSError as error:
        raise ResourceError("cannot start ONNX Runtime", why=str(error)) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise VerificationError(f"ONNX Runtime failed on {model.name}", why=last[0])
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def _measured(model: Path, mode: str, prompt: int, new: int, threads: int) -> Speed:
    import onnxruntime  # noqa: F401 - its own memory is not the model's
    import torch

    from runtimes.onnxruntime import OnnxRuntime

    before = _resident_bytes()
    chosen: Any = mode
    runtime = OnnxRuntime(model, mode=chosen, threads=threads or None, spin=True)
    start = time.perf_counter()
    runtime.greedy([0], 1)
    load = time.perf_counter() - start
    ids = torch.arange(prompt)[None] % runtime.vocabulary

    def seconds(count: int) -> float:
        start = time.perf_counter()
        runtime.greedy_batch(ids, count)
        return time.perf_counter() - start

    evaluation = min(seconds(1) for _ in range(3))
    generation = min(seconds(new + 1) for _ in range(3)) - evaluation
    return Speed(
        load_seconds=load,
        prompt_tokens_per_second=prompt / evaluation,
        new_tokens_per_second=new / max(generation, 1e-9),
        memory_bytes=_resident_bytes() - before if before else 0,
    )


def _resident_bytes() -> int:
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    import resource

    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    path, mode, *numbers = sys.argv[1:]
    found = _measured(Path(path), mode, *map(int, numbers))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
