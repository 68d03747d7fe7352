"""Random models in float64 as plain tensors, and transformers as the judge of their function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.architectures import get_architecture
from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.architectures.spaces import Space, spaces_of
from tests.tiny import random_model

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama tied": {"tie_word_embeddings": True},
    "llama biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen2 tied": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 32},
    "qwen3 tied": {"tie_word_embeddings": True},
}
"""Grouped query attention throughout, heads wider than hidden / heads in one of them."""


class _Norm(nn.Module):
    """An RMSNorm that stays in float64."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight, self.eps = stock.weight, stock.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Judge:
    """A whole transformers model in float64 whose weights can be exchanged.

    Args:
        name: One of `SETTINGS`.
    """

    def __init__(self, name: str) -> None:
        family = name.split()[0]
        self.tied = SETTINGS[name]["tie_word_embeddings"]
        model = random_model(family, **SETTINGS[name]).double()
        self.config = {**model.config.to_dict(), "model_type": family}
        self.weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
        if self.tied:
            del self.weights[HEAD]
        self._model = random_model(family, **{**SETTINGS[name], "tie_word_embeddings": False})
        self._model.double()
        for module in list(self._model.modules()):
            for child_name, child in module.named_children():
                if type(child).__name__.endswith("RMSNorm"):
                    setattr(module, child_name, _Norm(child))
        self.ids = torch.randint(512, (3, 40), generator=torch.Generator().manual_seed(3))

    def spaces(self, *, tied: bool | None = None) -> tuple[Space, ...]:
        tie = self.tied if tied is None else tied
        config = {**self.config, "tie_word_embeddings": tie}
        return spaces_of(get_architecture(config), config)

    def read(self, name: str) -> Tensor:
        return self.weights[EMBEDDING if name == HEAD and self.tied else name]

    @torch.no_grad()
    def logits(self, weights: Mapping[str, Tensor]) -> Tensor:
        full = {HEAD: weights[EMBEDDING], **weights}
        self._model.load_state_dict(full, strict=True)
        return self._model(input_ids=self.ids).logits
