"""Checkpoints that are 4-bit already: the same integers and scales in ggml's blocks."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.architectures.base import EMBEDDING, HEAD
from pipeline.checkpoint import MIDDLE, PackedMatrix
from pipeline.errors import InputError
from pipeline.progress import Progress
from pipeline.quantization.formats import FP16, QuantizedTensor, get_format
from pipeline.run_directory import RunDirectory
from pipeline.stages.load import Source
from pipeline.stages.quantize import Part, QuantizedModel, part_by_part
from pipeline.stages.stored import StoredTensor
from pipeline.stages.walk import store_free


def repack(source: Source, run: RunDirectory, progress: Progress) -> QuantizedModel:
    """Store every packed matrix of a checkpoint as it is; embedding and head, where they are not
    packed, in their types without data, other matrices in F16.

    Integers and scales of symmetric schemes are those of Q4_0, exactly if the scales are numbers of
    fp16. Zero points become offsets of Q4_1, ``-s z``, which fp16 rounds where the product has more
    than 11 significant bits. The record of each matrix says which it was.

    Args:
        source: A checkpoint with packed matrices.
        run: Where finished blocks are kept.
        progress: Told about blocks, and the error of each matrix relative to its energy.

    Raises:
        InputError: A scale is beyond fp16.
    """

    def make(names: list[str]) -> Part:
        stored = {name: _stored(name, source) for name in names}
        packed = [name for name in names if name in source.checkpoint.packed]
        return Part(stored, [_record(n, stored[n], source, progress) for n in packed])

    return part_by_part(source, run, progress, make)


def _stored(name: str, source: Source) -> StoredTensor:
    kind, matrix = source.plan.types[name], source.checkpoint.packed.get(name)
    if matrix is not None:
        return StoredTensor(kind, repacked(matrix))
    if name in (EMBEDDING, HEAD):
        return store_free(kind, source.read(name))
    return StoredTensor.floating(kind, source.read(name))


def repacked(matrix: PackedMatrix) -> QuantizedTensor:
    """Q4_0 where all zero points are in the middle, else Q4_1.

    Raises:
        InputError: A scale or an offset is beyond fp16.
    """
    scales, zeros = matrix.scales(), torch.from_numpy(matrix.zeros())
    codes = torch.from_numpy(matrix.codes())
    symmetric = bool((zeros == MIDDLE).all())
    fmt = get_format("Q4_0" if symmetric else "Q4_1")
    fields = {"d": scales} | ({} if symmetric else {"m": -scales * zeros})
    if max(float(value.abs().max()) for value in fields.values()) > FP16.max_value:
        raise InputError(
            f"{matrix.name}: a scale or offset is beyond fp16",
            why="ggml stores them in fp16",
            fix="give the original full-precision checkpoint",
        )
    blocks = matrix.group // fmt.group_size
    stored = {n: FP16.round(v).repeat_interleave(blocks, dim=1) for n, v in fields.items()}
    shifted = codes.to(torch.int8) - (MIDDLE if symmetric else 0)
    return QuantizedTensor(fmt, shifted, stored)


def _record(name: str, stored: StoredTensor, source: Source, progress: Progress) -> dict[str, Any]:
    """How far the stored matrix is from what the checkpoint's one stands for."""
    wanted = source.read(name)
    difference = stored.dequantize() - wanted
    energy = float(wanted.norm().square())
    loss = float(difference.norm().square()) / max(energy, 1e-300)
    progress.figure(name.removesuffix(".weight").rpartition(".")[2], loss)
    return {
        "matrix": name,
        "loss": loss,
        "largest_difference": float(difference.abs().max()),
        "exact": not bool(difference.any()),
        "damping_raised": 0,
        "dead_inputs": 0,
    }
