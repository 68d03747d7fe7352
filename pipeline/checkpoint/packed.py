"""Checkpoints that were quantized to 4 bits elsewhere: GPTQ, AWQ and compressed-tensors.

Their matrices are integers q of 4 bits with a scale s and a zero point z for every group of
consecutive inputs, ``w = s (q - z)``. Where they lie in the files:

- GPTQ (AutoGPTQ, GPTQModel): ``qweight`` int32 [in / 8, out], eight inputs a word, lowest bits
  first; ``qzeros`` int32 [groups, out / 8] of z - 1 (``checkpoint_format`` gptq) or z (gptq_v2);
  ``scales`` [groups, out]; ``g_idx`` int32 [in], the group of every input.
- AWQ (AutoAWQ, version gemm): ``qweight`` int32 [in, out / 8], the outputs of a word in the order
  0 2 4 6 1 3 5 7; ``qzeros`` int32 [groups, out / 8] likewise; ``scales`` [groups, out].
- compressed-tensors (pack-quantized): ``weight_packed`` int32 [out, in / 8] of q, counted from the
  smallest integer; ``weight_scale`` [out, groups]; where the scheme is not symmetric
  ``weight_zero_point`` int32 [out / 8, groups], packed along the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.checkpoint.header import TensorInfo
from pipeline.checkpoint.weights import Weights
from pipeline.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4
PER_WORD = 32 // BITS
MIDDLE = 1 << BITS - 1
"""Zero point of symmetric schemes."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Outputs of an AWQ word, from its lowest bits up."""

SCALE_DTYPES = frozenset({"F16", "BF16", "F32"})

_MEMBERS = {
    "gptq": ("qweight", "qzeros", "scales"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": ("weight_packed", "weight_scale"),
}
_EXTRA = ("g_idx", "weight_g_idx", "weight_shape", "weight_zero_point")


@dataclass(frozen=True)
class Scheme:
    """How the matrices of a checkpoint are packed.

    Attributes:
        method: ``gptq``, ``awq`` or ``compressed-tensors``.
        group: Inputs that share a scale; -1 for whole rows.
        zero_shift: What is added to stored zero points.
        symmetric: All zero points are the middle, whatever is stored.
    """

    method: str
    group: int
    zero_shift: int = 0
    symmetric: bool = False


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix, read when it is asked for.

    Attributes:
        name: Name of the linear, without ``.weight``.
        scheme: How it is packed.
        shape: [out, in].
        group: Inputs that share a scale.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    group: int
    _weights: Weights

    def codes(self) -> np.ndarray:
        """Integers q from 0 to 15, uint8 [out, in]."""
        rows, width = self.shape
        if self.scheme.method == "gptq":
            found = _nibbles(self._load("qweight").T)
        elif self.scheme.method == "awq":
            found = _nibbles(self._load("qweight"), AWQ_ORDER).T
        else:
            found = _nibbles(self._load("weight_packed"))
        return np.ascontiguousarray(found).reshape(rows, width)

    def zeros(self) -> np.ndarray:
        """Zero points z, int16 [out, groups].

        Raises:
            InputError: They contradict a symmetric scheme.
            UnsupportedError: Tools read them in different ways.
        """
        groups = self.shape[1] // self.group
        if self.scheme.method == "compressed-tensors":
            if self.scheme.symmetric:
                return np.full((self.shape[0], groups), MIDDLE, np.int16)
            return _nibbles(self._load("weight_zero_point").T).T.astype(np.int16)
        order = AWQ_ORDER if self.scheme.method == "awq" else None
        stored = _nibbles(self._load("qzeros"), order).T.astype(np.int16)
        if self.scheme.symmetric:
            # Some tools write z and announce z - 1; here both can only mean the middle.
            if not ((stored == MIDDLE - 1).all() or (stored == MIDDLE).all()):
                raise InputError(
                    f"{self.name}.qzeros are not in the middle",
                    why="config.json says that the scheme is symmetric",
                    fix="get the checkpoint again, or its original",
                )
            return np.full_like(stored, MIDDLE)
        if self.scheme.zero_shift and (stored == (1 << BITS) - 1).any():
            raise UnsupportedError(
                f"{self.name}.qzeros hold a 15, which stands for 16 or for 0",
                why="kernels for checkpoint_format gptq differ in whether they wrap around",
                fix="give the original full-precision checkpoint",
            )
        return stored + self.scheme.zero_shift

    def scales(self) -> Tensor:
        """Scales s, float32 [out, groups].

        Raises:
            InputError: One is not finite.
        """
        key = "weight_scale" if self.scheme.method == "compressed-tensors" else "scales"
        found = self._weights.loaders[f"{self.name}.{key}"]().float()
        if not bool(found.isfinite().all()):
            raise InputError(f"{self.name}.{key} is not finite", fix="get the checkpoint again")
        return (found if key == "weight_scale" else found.T).contiguous()

    def dequantize(self) -> Tensor:
        """``s (q - z)``, float32 [out, in].

        Raises:
            UnsupportedError: The groups are scattered, or the zero points ambiguous.
        """
        import torch

        self.check_order()
        spread = [
            torch.from_numpy(np.repeat(a, self.group, axis=1))
            for a in (self.zeros(), self.scales().numpy())
        ]
        return spread[1] * (torch.from_numpy(self.codes()).short() - spread[0]).float()

    def check_order(self) -> None:
        """Refuse groups whose inputs are not consecutive.

        Raises:
            UnsupportedError: Activation order has scattered them.
        """
        for key in ("g_idx", "weight_g_idx"):
            load = self._weights.loaders.get(f"{self.name}.{key}")
            if load is None:
                continue
            expected = np.arange(self.shape[1]) // self.group
            if not np.array_equal(load().float().numpy(), expected):
                raise UnsupportedError(
                    f"{self.name}: the groups are scattered over the inputs ({key})",
                    why="it was quantized with act_order, and ggml's blocks are consecutive inputs",
                    fix="quantize the original checkpoint: python -m pipeline deploy ORIGINAL",
                )

    def _load(self, key: str) -> np.ndarray:
        array: np.ndarray = self._weights.loaders[f"{self.name}.{key}"]().numpy()
        return array.view(np.uint32)


def _nibbles(words: np.ndarray, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Words uint32 [n, m] -> their integers uint8 [n, 8 m]; `order` says where each goes."""
    words = np.ascontiguousarray(words)
    places = np.arange(PER_WORD) if order is None else np.array(order)
    found = np.empty((*words.shape, PER_WORD), np.uint8)
    for bits, place in enumerate(places):
        found[..., place] = words >> np.uint32(BITS * bits) & np.uint32(15)
    return found.reshape(len(words), -1)


def find_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """What ``quantization_config`` says; None if there is none, or of a method that is not known.

    Raises:
        UnsupportedError: A known method in a form that cannot be repacked.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(found, dict):
        return None
    method = found.get("quant_method")
    if method == "gptq":
        _demand(found.get("bits") == BITS, f"GPTQ with {found.get('bits')} bits")
        _refuse_if_set(found, ("dynamic", "adapter", "rotation"))
        layout = found.get("checkpoint_format") or "gptq"
        _demand(layout in ("gptq", "gptq_v2"), f"checkpoint_format {layout!r}")
        shift = 0 if layout == "gptq_v2" else 1
        group = _group(found.get("group_size"))
        return Scheme("gptq", group, zero_shift=shift, symmetric=found.get("sym") is True)
    if method == "awq":
        _demand(found.get("bits") == BITS, f"AWQ with {found.get('bits')} bits")
        version = str(found.get("version", "gemm")).lower()
        _demand(version == "gemm", f"AWQ version {version}")
        return Scheme("awq", _group(found.get("group_size")))
    return _compressed(found) if method == "compressed-tensors" else None


def _compressed(found: Mapping[str, Any]) -> Scheme:
    _demand(found.get("format") == "pack-quantized", f"format {found.get('format')!r}")
    _refuse_if_set(found, ("transform_config", "sparsity_config", "kv_cache_scheme"))
    groups = found.get("config_groups")
    settings = list(groups.values()) if isinstance(groups, dict) else []
    _demand(len(settings) == 1, "several groups of settings, or none")
    weights = settings[0].get("weights") if isinstance(settings[0], dict) else None
    if not isinstance(weights, dict):
        raise InputError(
            "config.json: config_groups does not describe weights",
            fix="download it again, or give the original checkpoint",
        )
    _refuse_if_set(settings[0], ("input_activations", "output_activations"))
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
    _demand(kind[:2] == (BITS, "int") and kind[2] in ("group", "channel"), f"weights {kind}")
    group = weights.get("group_size") if kind[2] == "group" else -1
    symmetric = weights.get("symmetric", True) is True
    return Scheme("compressed-tensors", _group(group), symmetric=symmetric)


def _refuse_if_set(found: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Refuse settings that change what the model computes and that a GGUF file cannot say."""
    for key in keys:
        _demand(not found.get(key), f"it has {key}")


def _group(value: Any) -> int:
    _demand(type(value) is int and (value == -1 or value > 0), f"group_size {value!r}")
    return int(value)


def _demand(held: bool, what: str) -> None:
    if not held:
        raise UnsupportedError(
            f"the checkpoint is already quantized, and not in a way that can be repacked: {what}",
            why="repacked are GPTQ, AWQ (gemm) and compressed-tensors (pack-quantized) of 4 bits",
            fix="give the original full-precision checkpoint",
        )


def unpacked(weights: Weights, scheme: Scheme) -> tuple[Weights, dict[str, PackedMatrix]]:
    """The checkpoint as if its packed matrices were stored as floats, and those matrices.

    Args:
        weights: What the files hold.
        scheme: From `find_scheme`.

    Returns:
        Weights in which ``NAME.weight`` stands for the members of each packed matrix, and the
        matrices by that name.

    Raises:
        InputError: A member is missing, or of another shape or type than the others imply.
    """
    first, *others = _MEMBERS[scheme.method]
    tensors, loaders = dict(weights.tensors), dict(weights.loaders)
    matrices: dict[str, PackedMatrix] = {}
    for key in weights.tensors:
        name, _, member = key.rpartition(".")
        if member != first:
            continue
        shape = _shape(weights.tensors[key], scheme)
        group = shape[1] if scheme.group == -1 else scheme.group
        matrix = PackedMatrix(name, scheme, shape, group, weights)
        _check_members(matrix, weights.tensors)
        for gone in (first, *others, *_EXTRA):
            tensors.pop(f"{name}.{gone}", None)
        file = weights.tensors[key].file
        tensors[f"{name}.weight"] = TensorInfo(file, "F32", shape, 4 * shape[0] * shape[1])
        loaders[f"{name}.weight"] = matrix.dequantize
        matrices[f"{name}.weight"] = matrix
    if not matrices:
        raise InputError(
            f"config.json says {scheme.method}, but no tensor is called ...{first}",
            fix="download the whole model again, from one revision",
        )
    return Weights(tensors, weights.files, weights.notes, loaders), matrices


def _shape(info: TensorInfo, scheme: Scheme) -> tuple[int, int]:
    if info.dtype != "I32" or len(info.shape) != 2 or 0 in info.shape:
        raise InputError(
            f"packed integers in {info.file} are {info.dtype} {list(info.shape)}",
            why="they must be a matrix of I32",
            fix="download the whole model again, from one revision",
        )
    a, b = info.shape
    if scheme.method == "gptq":
        return b, a * PER_WORD
    return (b * PER_WORD, a) if scheme.method == "awq" else (a, b * PER_WORD)


def _check_members(matrix: PackedMatrix, tensors: Mapping[str, TensorInfo]) -> None:
    rows, width = matrix.shape
    if width % matrix.group:
        raise InputError(f"{matrix.name}: {width} inputs do not divide into {matrix.group}")
    if rows % PER_WORD:
        raise UnsupportedError(
            f"{matrix.name}: {rows} outputs are not a multiple of {PER_WORD}",
            fix="give the original full-precision checkpoint",
        )
    groups, words = width // matrix.group, rows // PER_WORD
    integers = frozenset({"I32"})
    if matrix.scheme.method == "compressed-tensors":
        wanted: dict[str, tuple[tuple[int, ...], frozenset[str]]]
        wanted = {"weight_scale": ((rows, groups), SCALE_DTYPES)}
        if not matrix.scheme.symmetric:
            wanted["weight_zero_point"] = ((words, groups), integers)
    else:
        wanted = {
            "scales": ((groups, rows), SCALE_DTYPES),
            "qzeros": ((groups, words), integers),
        }
    for key in ("g_idx", "weight_g_idx"):
        if f"{matrix.name}.{key}" in tensors:
            wanted[key] = ((width,), frozenset({"I32", "I64"}))
    for key, (shape, dtypes) in wanted.items():
        info = tensors.get(f"{matrix.name}.{key}")
        if info is None or info.shape != shape or info.dtype not in dtypes:
            found = "missing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise InputError(
                f"{matrix.name}.{key} is {found}",
                why=f"a matrix of {rows} x {width} in groups of {matrix.group} needs "
                f"{' or '.join(sorted(dtypes))} {list(shape)}",
                fix="download the whole model again, from one revision",
            )
