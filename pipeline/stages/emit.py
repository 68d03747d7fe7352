"""Files that let others check a deploy with stock tools, or build on its calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from exporters.gguf import gguf_name
from exporters.gguf.imatrix import write_imatrix
from exporters.gguf.kld_base import write_kld_base
from pipeline.recipe import Recipe
from pipeline.stages.calibrate import Texts
from pipeline.stages.quantize import QuantizedModel
from runtimes.torch_reference import TorchReference

IMATRIX = "imatrix.gguf"
KLD_BASE = "kld-base.bin"


def emit(folder: Path, model: QuantizedModel, recipe: Recipe, texts: Texts) -> None:
    """Write what ``--emit`` asks for.

    Args:
        folder: The output folder.
        model: The finished matrices, with the mean squares of their inputs.
        recipe: Says what to write.
        texts: Calibration windows, named in the matrix, and evaluation windows.
    """
    if "imatrix" in recipe.emit:
        importance = {gguf_name(n): v.numpy() for n, v in model.importance().items()}
        samples, length = texts.calibration.shape
        write_imatrix(
            folder / IMATRIX,
            importance,
            tokens=samples * length,
            chunk=length,
            dataset=texts.sources[0].name,
        )
    if "kld-base" in recipe.emit:
        _emit_logits(folder / KLD_BASE, model, texts)


@torch.inference_mode()
def _emit_logits(path: Path, model: QuantizedModel, texts: Texts) -> None:
    source = model.source
    protocol, tokens = next(iter(texts.evaluation.items()))
    reference = TorchReference(source.config, source.original, head=source.head)
    logits = (rows.numpy() for rows in reference.logits(tokens, protocol.first))
    write_kld_base(path, tokens.numpy().astype(np.int32), logits)
