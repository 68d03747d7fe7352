"""Tiny models as ONNX files, and ONNX Runtime around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from exporters.onnx import Rotary, WeightEntry, integer_weight, write_onnx
from pipeline.quantization.formats import QuantizedTensor, get_format, stored_pair
from tests.tiny import random_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEARS = 14
"""Of a tiny model: 7 in each of 2 blocks."""

EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}


def rounded(weight: torch.Tensor, type_name: str) -> QuantizedTensor:
    """Nearest codes under one scale a group; every second scale is negative, or there are zero
    points."""
    fmt = get_format(type_name)
    group = fmt.group_of(weight.shape[1])
    groups = weight.detach().reshape(weight.shape[0], -1, group)
    if fmt.zero_lattice is not None:
        low, high = groups.amin(-1), groups.amax(-1)
        d, m = (t.float() for t in stored_pair(fmt, (high - low) / fmt.levels[-1], low))
        codes = ((groups - m[..., None]) / d[..., None]).round().clamp(0, fmt.levels[-1])
        return QuantizedTensor(fmt, codes.reshape(weight.shape).to(torch.int8), {"d": d, "m": m})
    if fmt.affine:
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        d = ((high - low) / fmt.levels[-1]).half().float()
        zeros = (-low / d).round().clamp(0, fmt.levels[-1])
        codes = (groups / d[..., None] + zeros[..., None]).round().clamp(0, fmt.levels[-1])
        fields = {"d": d, "m": 0.0 - d * zeros}
        return QuantizedTensor(fmt, codes.reshape(weight.shape).to(torch.int8), fields)
    d = groups.abs().amax(-1) / max(abs(fmt.levels[0]), fmt.levels[-1])
    d = fmt.scale_lattice.round(d)
    if fmt.scale_lattice.signed:
        d[:, ::2] *= -1
    ratio = (groups / d[..., None]).clamp(fmt.levels[0], fmt.levels[-1])
    if max(fmt.levels) == -min(fmt.levels) and len(fmt.levels) in (15, 253):
        nearest = (ratio[..., None].double() - fmt.grid).abs().argmin(-1)
        codes = nearest + fmt.code_min
    else:
        codes = ratio.round()
    return QuantizedTensor(fmt, codes.reshape(weight.shape).to(torch.int8), {"d": d})


class TinyModel:
    """A random transformers model and the entries of its ONNX twin.

    Args:
        family: Of the model.
        type_of: Type of a matrix by its name; after this the model holds the stored values.
        packed: Store 3-bit codes as planes.
        **config: Settings of the transformers config.
    """

    def __init__(
        self,
        family: str = "llama",
        type_of: Callable[[str], str] = lambda _: "F32",
        *,
        packed: bool = False,
        **config: Any,
    ) -> None:
        self.packed = packed
        self.torch = random_model(family, **config)
        self.config = self.torch.config.to_dict()
        embedding = self.torch.model.rotary_emb
        self.rotary = Rotary(embedding.inv_freq.tolist(), embedding.attention_scaling)
        self.solved: dict[str, QuantizedTensor] = {}
        self.entries: list[WeightEntry] = []
        for name, weight in self.torch.named_parameters():
            self._add(name, weight, type_of(name) if weight.ndim == 2 else "F32")

    def _add(self, name: str, weight: torch.nn.Parameter, kind: str) -> None:
        if kind not in ("F32", "F16"):
            solved = self.solved[name] = rounded(weight, kind)
            weight.data.copy_(solved.dequantize())
            self.entries.append(
                WeightEntry(
                    name,
                    kind,
                    tuple(weight.shape),
                    lambda: integer_weight(solved, name),
                    self.packed,
                )
            )
            return
        if kind == "F16":
            weight.data.copy_(weight.data.half())
        self.entries.append(
            WeightEntry(name, kind, tuple(weight.shape), lambda: weight.detach().numpy())
        )

    def write(self, folder: Path, **options: Any) -> Path:
        return write_onnx(
            folder, config=self.config, entries=self.entries, rotary=self.rotary, **options
        )

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        mask = np.ones_like(ids) if mask is None else mask
        with torch.no_grad():
            return self.torch(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                position_ids=torch.from_numpy(positions_of(mask)),
            ).logits.numpy()


def positions_of(mask: np.ndarray) -> np.ndarray:
    """Position of each token among the real ones of its row."""
    return np.maximum(mask.cumsum(axis=1) - 1, 0)


def random_ids(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 512, (rows, length), dtype=np.int64)


def session(path: Path, options: dict[str, str] = EXACT, optimized: Path | None = None) -> Any:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def run(
    runtime: Any,
    ids: np.ndarray,
    mask: np.ndarray | None = None,
    past: dict[str, np.ndarray] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of the ids, and the cache in the form of the next call's `past`."""
    mask = np.ones_like(ids) if mask is None else mask
    feeds = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions_of(mask)[:, -ids.shape[1] :],
    }
    for value in runtime.get_inputs():
        if value.name.startswith("past"):
            empty = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
            feeds[value.name] = empty if past is None else past[value.name]
    names = [value.name for value in runtime.get_outputs()]
    found = dict(zip(names, runtime.run(names, feeds), strict=True))
    logits = found.pop("logits")
    return logits, {n.replace("present", "past_key_values"): x for n, x in found.items()}


def census(path: Path, scratch: Path, options: dict[str, str] = EXACT) -> Counter[str]:
    """Nodes of each kind after ONNX Runtime's optimizations; products with weights apart."""
    optimized = scratch / "optimized.onnx"
    session(path, options, optimized)
    graph = onnx.load(str(optimized), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    return Counter(
        "unfused linear"
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm") and weights & set(node.input)
        else node.op_type
        for node in graph.node
    )


def fused_as_solved(model: TinyModel, folder: Path) -> tuple[Path, Counter[str]]:
    """Write a model and check it: its logits are the library's, and every product with weights, the
    head's too, is fused.

    Returns:
        The file and the census of its nodes.
    """
    path, ids = model.write(folder), random_ids(2, 20)
    onnx.checker.check_model(str(path), full_check=True)
    assert np.abs(run(session(path), ids)[0] - model.logits(ids)).max() < 2e-5
    left = census(path, folder)
    assert left["MatMulNBits"] == LINEARS + 1
    assert left["DequantizeLinear"] == left["unfused linear"] == 0
    return path, left


def bytes_of(path: Path, name: str) -> int:
    """Bytes of all initializers whose names begin so."""
    held = onnx.load(str(path)).graph.initializer
    return sum(len(tensor.raw_data) for tensor in held if tensor.name.startswith(name))
