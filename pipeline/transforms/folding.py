"""Norm gains into the linears that follow them, on which rotations of the residual stream rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.architectures.spaces import Role
from pipeline.transforms.model import Model
from pipeline.transforms.operators import Fold

NORMS = ("attention_norm", "ffn_norm", "final_norm")


def plan_fold(model: Model, options: Mapping[str, Any]) -> None:
    """Fold every gain that is not one already: ``W diag(g)`` reads what ``g`` no longer scales.

    The gain of the final norm stays where the head is the embedding, which nothing may scale.
    """
    spaces = list(model.of_kinds(NORMS))
    if not any(space.kind == "final_norm" for space in spaces):
        model.notes.append("the final norm keeps its gain: the head is the embedding")
    for space in spaces:
        gain = model.read(space.with_role(Role.WRITES)[0])
        if not (gain == 1).all():
            model.change(space, Fold(gain))
