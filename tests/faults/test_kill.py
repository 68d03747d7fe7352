"""Kill -9 anywhere, run the same command again: the same bytes."""

from __future__ import annotations

import itertools
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.deploying import ROOT, arguments, digest_of_model

OPTIONS = {"evaluation.chunks": 4, "gates.deployed_lnppl": 1.0}


def run(output: Path, seconds: float | None) -> int:
    """Run a deploy of the demo model; SIGKILL it after `seconds`."""
    with subprocess.Popen(
        arguments(None, output, OPTIONS),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    started = time.monotonic()
    assert run(tmp_path / "whole", None) == 0
    duration = time.monotonic() - started
    generator = random.Random(0)
    kills = 0
    for n in itertools.count():
        if n >= 10 and kills >= 10:
            break
        output = tmp_path / f"killed-{n}"
        while (code := run(output, generator.uniform(0.1, duration))) != 0:
            assert code == -9
            if output.exists():
                assert digest_of_model(output) == digest_of_model(tmp_path / "whole")
            kills += 1
            if kills % 3 == 0:
                code = run(output, None)
                assert code == 0
                break
        assert digest_of_model(output) == digest_of_model(tmp_path / "whole")
