"""Finds the weight files of a checkpoint folder and what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.untrusted import quoted
from pipeline.checkpoint.files import read_json
from pipeline.checkpoint.header import TensorInfo, read_tensor_infos
from pipeline.checkpoint.pickled import read_pickle
from pipeline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"

Load = Callable[[], "Tensor"]


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint.

    Attributes:
        tensors: What each is, and the file that holds it.
        files: The weight files, and the index if there is one.
        notes: Oddities that do no harm.
        loaders: Give a tensor as stored, perhaps mapped from the file: not to be written to.
    """

    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    notes: tuple[str, ...]
    loaders: Mapping[str, Load]


def find_weights(folder: Path, allow_pickle: bool) -> Weights:
    """The weights in a folder: one file, or shards and their index; headers only.

    Raises:
        InputError: None found, pickled and not allowed, a missing, broken or lying file.
    """
    for name, pickled in ((SAFETENSORS, False), (PICKLE, True)):
        single, index = folder / name, folder / f"{name}{INDEX_SUFFIX}"
        if not single.exists() and not index.exists():
            continue
        if pickled and not allow_pickle:
            raise InputError(
                f"{folder} holds only pickled weights ({name})",
                why="a pickle can run code when it is opened",
                fix="get a safetensors version, or allow pickles if you trust the author",
            )
        return _single(single, pickled) if single.exists() else _sharded(index, pickled)
    strays = sorted(path.name for path in folder.glob("*.safetensors"))
    raise InputError(
        f"no weights in {folder}",
        why=f"neither {SAFETENSORS} nor {SAFETENSORS}{INDEX_SUFFIX} is there"
        + (f", but {', '.join(strays[:3])} is" if strays else ""),
        fix="download the whole model" + (" with its index file" if strays else ""),
    )


def _single(path: Path, pickled: bool) -> Weights:
    tensors, loaders = _open(path, pickled)
    return Weights(tensors, (path,), (), loaders)


def _sharded(index: Path, pickled: bool) -> Weights:
    """Shards, each tensor in the shard that the index says."""
    shard_of = read_index(index)
    tensors: dict[str, TensorInfo] = {}
    loaders: dict[str, Load] = {}
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if not shard.exists():
            raise InputError(
                f"missing shard {shard.name}",
                why=f"{index} lists {len(shards)} shards, this one is not in the folder",
                fix="download the whole model",
            )
        infos, loads = _open(shard, pickled)
        twice = infos.keys() & tensors.keys()
        if twice:
            name = min(twice)
            raise InputError(
                f"tensor {quoted(name)} is in two shards",
                why=f"{tensors[name].file.name} and {shard.name}: which one counts is not defined",
            )
        tensors.update(infos)
        loaders.update(loads)
    for name, shard in shard_of.items():
        if name not in tensors or tensors[name].file != shard:
            raise InputError(
                f"{index} is wrong: tensor {quoted(name)} is not in {shard.name}",
                fix="download the whole model again, from one revision",
            )
    unlisted = sorted(tensors.keys() - shard_of.keys())
    notes = tuple(f"{index.name} does not list {quoted(name)}" for name in unlisted[:8])
    return Weights(tensors, (index, *shards), notes, loaders)


def read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> shard, which is always a file directly in the folder of the index.

    Raises:
        InputError: Malformed, or a shard name that leads elsewhere.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map", fix="download it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file):
            raise InputError(
                f"{index} names the shard {file!r} for tensor {quoted(name)}",
                why="a shard must be a plain file name inside the model folder",
                fix="do not use this checkpoint: no ordinary tool writes such an index",
            )
    return {name: index.parent / file for name, file in weight_map.items()}


def is_plain_name(name: str) -> bool:
    """Whether a file name cannot lead out of its folder on any system."""
    return name not in {"", ".", ".."} and not any(c in name for c in "/\\:\0")


def _open(path: Path, pickled: bool) -> tuple[dict[str, TensorInfo], dict[str, Load]]:
    if pickled:
        return read_pickle(path)
    tensors = read_tensor_infos(path)
    return tensors, {name: _safetensors_loader(path, name) for name in tensors}


def _safetensors_loader(path: Path, name: str) -> Load:
    def load() -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"cannot read tensor {name} from {path}",
                why=f"{error}; the file may have changed since it was opened",
            ) from error
        return tensor

    return load
