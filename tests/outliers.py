"""A checkpoint with outlier channels that computes what it computed before.

Real models have channels whose activations are a hundred times larger than the others'. Here a few
channels of every space that may be rescaled are: what writes them is multiplied, what reads them is
divided. (The residual stream itself cannot be rescaled: RMSNorm divides by the size of all of its
channels together. The channels that linears read behind a norm can.)
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.architectures.spaces import spaces_of
from pipeline.recipe_files import load_recipe
from pipeline.stages.load import open_source
from pipeline.transforms.changes import Change
from pipeline.transforms.operators import Scaling

KINDS = ("attention_norm", "ffn_norm", "values", "inner")


def inject(
    model: Path,
    target: Path,
    *,
    factor: float = 100.0,
    channels: int = 4,
    seed: int = 0,
    kinds: tuple[str, ...] = KINDS,
    together: bool = False,
) -> Path:
    """Writes the checkpoint with outliers, float32, and returns its folder.

    Args:
        model: The checkpoint.
        target: Folder to make.
        factor: How much larger outliers become.
        channels: Outliers a space.
        seed: Decides which channels.
        kinds: Kinds of spaces.
        together: The first channels of each space, side by side, instead of random ones.
    """
    recipe = load_recipe(options={"model": str(model), "type": "Q8_0", "allow_fallback": True})
    source = open_source(recipe.recipe, allow_pickle=False)
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randperm(source.config.hidden_size, generator=generator)[:channels]
    changes = []
    for space in spaces_of(source.checkpoint.architecture, source.checkpoint.config):
        if space.kind not in kinds:
            continue
        factors = torch.ones(space.width, dtype=torch.float64)
        drawn = torch.randperm(space.width, generator=generator)[:channels]
        chosen = stream if space.kind.endswith("norm") else drawn
        factors[torch.arange(channels) if together else chosen] = factor
        changes.append(Change(space, Scaling(factors)))
    source = replace(source, changes=tuple(changes))
    target.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix != ".safetensors" and path.name != "model.safetensors.index.json":
            shutil.copy(path, target / path.name)
    config = json.loads((model / "config.json").read_text()) | {"torch_dtype": "float32"}
    (target / "config.json").write_text(json.dumps(config))
    weights = {name: source.read(name) for name in source.checkpoint.shapes}
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target
