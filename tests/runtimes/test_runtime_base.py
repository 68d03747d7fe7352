"""What every runtime shares: the check of its windows, and closing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipeline.errors import InputError
from runtimes.base import Runtime, check_windows


class EmptyRuntime(Runtime):
    closed = False

    @property
    def name(self) -> str:
        return "empty"

    def logits(self, tokens: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        return iter(())

    def tokenize(self, text: str) -> list[int]:
        return []

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("tokens", "first", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 0, "windows are int64"),
        (torch.zeros(1, 4, dtype=torch.int32), 0, "windows are int64"),
        (torch.zeros(1, 4, dtype=torch.int64), 3, "nothing to score"),
        (torch.zeros(1, 4, dtype=torch.int64), -1, "nothing to score"),
        (torch.full((1, 4), -5), 0, "negative token id -5"),
    ],
)
def test_windows_that_no_runtime_can_evaluate(
    tokens: torch.Tensor, first: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_windows(tokens, first)


def test_leaving_the_context_closes() -> None:
    with EmptyRuntime() as runtime:
        assert isinstance(runtime, Runtime)
        assert not runtime.closed
    assert runtime.closed
