"""What transforms ask of a checkpoint, decided from its headers before any work."""

from __future__ import annotations

from dataclasses import replace

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedError, UsageError
from pipeline.recipe import Recipe
from pipeline.stages.plan import plan_types
from pipeline.transforms import TRANSFORMS, Transform, parse_transform


def prepare_for_transforms(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint itself, or with an untied head if a transform needs it and may have it.

    Raises:
        UnsupportedError: The target cannot run a transform, or the head would have to be untied
            without leave; names the bytes that it costs.
        UsageError: Transforms with weights or measurements that belong to the model as it was.
    """
    transforms = [parse_transform(text) for text in recipe.transforms]
    if not transforms:
        return checkpoint
    _refuse_online(transforms, recipe)
    _refuse_foreign(checkpoint, recipe)
    unties = [transform for transform in transforms if transform.unties]
    if not unties or not checkpoint.tied:
        return checkpoint
    untied = checkpoint.untied()
    before, after = _bytes(checkpoint, recipe), _bytes(untied, recipe)
    cost = f"{after - before:,} bytes more, {(after - before) / before:.1%} of the weights"
    if not all(transform.options["allow_untie"] for transform in unties):
        raise UnsupportedError(
            f"rotating the residual stream unties the head of this model: {cost}",
            why="the embedding and the head would have to be different matrices: only the head "
            "takes up the final norm's gain",
            fix="rotate:allow_untie=true accepts the cost, rotate:spaces=values does without",
        )
    note = f"the head was the embedding and is stored apart for the rotation: {cost}"
    return replace(untied, notes=(*untied.notes, note))


def _refuse_online(transforms: list[Transform], recipe: Recipe) -> None:
    for transform in transforms:
        reason = TRANSFORMS[transform.kind].online
        if reason and "gguf" in recipe.target:
            raise UnsupportedError(
                f"{transform} cannot be exported to GGUF",
                why=reason,
                fix="rotate and permute are merged into the weights and run anywhere",
            )


def _refuse_foreign(checkpoint: Checkpoint, recipe: Recipe) -> None:
    if checkpoint.packed:
        raise UsageError(
            "transforms cannot be applied to a checkpoint that is 4-bit already",
            why="its integers and scales are kept as they are",
            fix="give the original full-precision checkpoint, or leave the transforms out",
        )
    if recipe.imatrix is not None or "imatrix" in recipe.emit:
        what = "--imatrix" if recipe.imatrix is not None else "--emit imatrix"
        raise UsageError(
            f"{what} cannot be combined with transforms",
            why="an importance matrix belongs to the inputs of the model as it was, and transforms "
            "change what the inputs are",
            fix="leave one of the two out",
        )


def _bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    plan = plan_types(checkpoint, recipe)
    shapes = dict(checkpoint.shapes)
    if HEAD in plan.types:
        shapes.setdefault(HEAD, shapes[EMBEDDING])
    return plan.size_bytes(shapes)
