"""Turns a float checkpoint into one that GPTQ, AWQ or compressed-tensors tools would have written.

Integers are laid into words one at a time, from the layouts' definitions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 64
AWQ_PLACE = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}
"""Where each of eight outputs lies in a word, in nibbles from the lowest."""


def quantized(weight: Tensor, group: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Integers [out, in], scales [out, groups] of few bits, zero points [out, groups]."""
    grouped = weight.double().numpy().reshape(len(weight), -1, group)
    low, high = grouped.min(2).clip(max=0), grouped.max(2).clip(min=0)
    span = 2 * np.maximum(-low, high) / 15 if symmetric else (high - low) / 15
    scales = span.astype(np.float16).astype(np.float64)
    zeros = np.full(scales.shape, 8) if symmetric else np.rint(-low / scales).astype(int)
    codes = np.rint(grouped / scales[:, :, None]) + zeros[:, :, None]
    return codes.clip(0, 15).astype(int).reshape(weight.shape), scales, zeros


def words(rows: np.ndarray, place: dict[int, int] | None = None) -> Tensor:
    """Eight neighbours of a row in one int32."""
    out = np.zeros((rows.shape[0], rows.shape[1] // 8), np.uint32)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            nibble = j % 8 if place is None else place[j % 8]
            out[i, j // 8] |= np.uint32(int(value) << 4 * nibble)
    return torch.from_numpy(out.view(np.int32))


def members(method: str, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict:
    """Tensors of one linear by the end of their names."""
    half = torch.tensor(scales, dtype=torch.float16)
    if method == "compressed-tensors":
        return {
            "weight_packed": words(codes),
            "weight_scale": half,
            "weight_zero_point": words(zeros.T).T.contiguous(),
            "weight_shape": torch.tensor(codes.shape),
        }
    if method == "awq":
        return {
            "qweight": words(codes.T, AWQ_PLACE),
            "qzeros": words(zeros.T, AWQ_PLACE),
            "scales": half.T.contiguous(),
        }
    stored = zeros.T - (0 if method == "gptq_v2" else 1)
    width = codes.shape[1]
    return {
        "qweight": words(codes).T.contiguous(),
        "qzeros": words(stored),
        "scales": half.T.contiguous(),
        "g_idx": torch.arange(width, dtype=torch.int32) // (width // scales.shape[1]),
    }


def settings(method: str, group: int, symmetric: bool) -> dict[str, Any]:
    """``quantization_config`` of config.json."""
    if method == "compressed-tensors":
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group",
            "group_size": group,
        }
        scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        groups = {"group_0": scheme}
        return {"quant_method": method, "format": "pack-quantized", "config_groups": groups}
    common = {"bits": 4, "group_size": group}
    if method == "awq":
        return {**common, "quant_method": "awq", "version": "gemm", "zero_point": True}
    return {**common, "quant_method": "gptq", "checkpoint_format": method, "sym": symmetric}


def write_packed(
    source: Path,
    target: Path,
    method: str,
    *,
    symmetric: bool,
    group: int = GROUP,
    head: bool = False,
) -> dict[str, Tensor]:
    """Write the checkpoint and return ``s (q - z)`` of every linear, float64, by weight name."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = settings(method, group, symmetric)
    (target / "config.json").write_text(json.dumps(config))
    tensors, expected = {}, {}
    for name, weight in load_file(target / "model.safetensors").items():
        linear = "_proj" in name or (head and name == "lm_head.weight")
        if not linear or weight.ndim != 2:
            tensors[name] = weight
            continue
        size = weight.shape[1] if group == -1 else group
        codes, scales, zeros = quantized(weight, size, symmetric)
        for key, value in members(method, codes, scales, zeros).items():
            if not (key == "weight_zero_point" and symmetric):
                tensors[f"{name.removesuffix('.weight')}.{key}"] = value
        spread = [np.repeat(a, size, axis=1) for a in (scales, zeros)]
        expected[name] = torch.from_numpy(spread[0] * (codes - spread[1]))
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return expected
