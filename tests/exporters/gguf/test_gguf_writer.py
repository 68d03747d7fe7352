"""Whole files: read back by the gguf package, loaded and run by stock llama.cpp."""

import copy
import errno
import hashlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from llamacpp_probe import load, logits, tokenize
from tiny_models import entries, random_model, saved_config, torch_logits

import exporters.gguf
from exporters.gguf import (
    TensorEntry,
    Vocabulary,
    check_writable,
    header_bytes,
    pack,
    padded,
    permute_rope,
    read_vocabulary,
    rope_heads,
    write_gguf,
)
from exporters.gguf.reader import open_gguf
from pipeline.errors import (
    InputError,
    ResourceError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from pipeline.quantization.formats import GGML_FORMATS, QuantizedTensor

DEMO = Path(__file__).parents[3] / "pipeline" / "demo" / "model"
MIX = {
    "token_embd": "Q8_0",
    "attn_q.": "Q4_0",
    "attn_k.": "Q4_1",
    "attn_v.": "Q5_0",
    "attn_output": "F16",
    "ffn_gate": "Q2_0",
    "ffn_down": "Q6_K",
}


def rounded(weight: torch.Tensor, name: str) -> QuantizedTensor:
    """Nearest codes on absmax scales; good enough to tell right bytes from wrong ones."""
    fmt = GGML_FORMATS[name]
    groups = weight.unflatten(1, (-1, fmt.super_group))
    low = groups.amin(2) if fmt.affine else torch.zeros(groups.shape[:2])
    reach = groups.amax(2) - low if fmt.affine else groups.abs().amax(2)
    scale = (reach / max(fmt.levels)).half().float()
    low = low.half().float()
    codes = ((groups - low[..., None]) / scale[..., None].clamp_min(1e-9)).round()
    codes = codes.clamp(min(fmt.levels), max(fmt.levels)).flatten(1).to(torch.int8)
    fields = {"d": scale, **({"m": low} if fmt.affine else {})}
    if fmt.sub_scale:
        shape = (len(weight), weight.shape[1] // fmt.group_size)
        fields["sc"] = torch.ones(shape, dtype=torch.int8)
    return QuantizedTensor(fmt, codes, fields)


def mixed_entry(entry: TensorEntry, types: dict[str, str]) -> tuple[TensorEntry, np.ndarray]:
    """The entry in its type of the mix, and the weights that the runtime decodes from it."""
    kind = next((t for part, t in types.items() if part in entry.name), "F32")
    data = np.asarray(entry.read())
    if kind in ("F32", "F16"):
        exact = data.astype(np.float16).astype(np.float32) if kind == "F16" else data
        return replace(entry, type=kind), exact
    tensor = rounded(torch.from_numpy(data), kind)
    packed = pack(tensor)
    return replace(entry, type=kind, read=lambda: packed), tensor.dequantize().numpy()


def demo_vocabulary(config: dict[str, Any]) -> Vocabulary:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO, trust_remote_code=False)
    return read_vocabulary(tokenizer, config)


@pytest.fixture(scope="module")
def demo() -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO).float().eval()
    return model, json.loads((DEMO / "config.json").read_text())


def test_demo_model_in_f32(demo: tuple, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model, config = demo
    path, tensors = tmp_path / "demo.gguf", entries(model, config)
    write_gguf(
        path,
        config=config,
        vocabulary=demo_vocabulary(config),
        tensors=tensors,
        file_type="F32",
        provenance={"general.quantized_by": "a test", "piso.recipe": ""},
        name="demo",
    )
    found = gguf.GGUFReader(path)
    assert [tensor.name for tensor in found.tensors] == [entry.name for entry in tensors]
    for tensor, entry in zip(found.tensors, tensors, strict=True):
        assert np.array_equal(tensor.data, entry.read())
    metadata = load(path)
    assert metadata["general.name"] == "demo"
    assert metadata["general.quantized_by"] == "a test"
    assert metadata["general.file_type"] == "0"
    assert "piso.recipe" in found.fields
    text = "def add(a, b):\n    return a + b\n"
    (prompt,) = tokenize(path, [text])
    expected = torch_logits(model, prompt)
    error = np.sqrt(np.mean((logits(path, prompt) - expected) ** 2) / np.mean(expected**2))
    assert error < 1e-5


@pytest.mark.parametrize("with_q2_0", [False, True])
def test_demo_model_in_mixed_types(demo: tuple, tmp_path: Path, with_q2_0: bool) -> None:
    pytest.importorskip("llama_cpp")
    model, config = demo
    mix = MIX if with_q2_0 else {**MIX, "ffn_gate": "Q4_0"}
    found = [mixed_entry(entry, mix) for entry in entries(model, config)]
    tensors, weights = [entry for entry, _ in found], [decoded for _, decoded in found]
    path = tmp_path / "demo.gguf"
    write_gguf(path, config=config, vocabulary=None, tensors=tensors, file_type="Q4_0")
    assert load(path)["general.file_type"] == "2"
    if not with_q2_0:  # gguf 0.19 cannot read Q2_0
        for tensor, entry, decoded in zip(
            gguf.GGUFReader(path).tensors, tensors, weights, strict=True
        ):
            assert tensor.tensor_type.name == entry.type
            assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), decoded)

    with open_gguf(path) as strict:
        for entry in tensors:
            stored = np.ascontiguousarray(entry.read(), np.float16 if entry.type == "F16" else None)
            assert strict.raw(entry.name).tobytes() == stored.tobytes()
            assert strict.tensors[entry.name].type_name == entry.type

    prompt = np.random.default_rng(0).integers(0, config["vocab_size"], 32).tolist()
    expected = torch_logits(model_with(demo[0], config, weights), prompt)
    error = np.sqrt(np.mean((logits(path, prompt) - expected) ** 2) / np.mean(expected**2))
    assert error < 0.05  # llama.cpp rounds activations to 8 bits


def model_with(
    model: torch.nn.Module, config: dict[str, Any], weights: list[np.ndarray]
) -> torch.nn.Module:
    """A copy of the model with other weights, given in the order and row order of the file."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for (_, parameter), entry, data in zip(
            changed.named_parameters(), entries(model, config), weights, strict=True
        ):
            heads = rope_heads(config, entry.name)
            if heads:
                order = permute_rope(np.arange(len(data)), heads)
                data = data[np.argsort(order)]
            parameter.copy_(torch.from_numpy(data.copy()))
    return changed


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, Any]:
    """Arguments of `write_gguf` for a small valid file."""
    model = random_model("llama", num_hidden_layers=1)
    config = saved_config(model, tmp_path)
    tensors = entries(model, config)
    return {"config": config, "vocabulary": None, "tensors": tensors, "file_type": "F32"}


def test_the_same_input_gives_the_same_bytes(tiny: dict, tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        write_gguf(tmp_path / name, **tiny)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_size_of_a_file_is_known_before_it_is_written(tiny: dict, tmp_path: Path) -> None:
    for name, provenance in (("", {}), ("a longer name", {"piso.note": "x" * 31})):
        options = {**tiny, "name": name, "provenance": provenance}
        write_gguf(tmp_path / "m.gguf", **options)
        data = sum(padded(entry.nbytes) for entry in tiny["tensors"])
        known = header_bytes(**options) + data
        assert (tmp_path / "m.gguf").stat().st_size == known
        quantized = [
            replace(entry, type="Q8_0") if len(entry.shape) == 2 else entry
            for entry in tiny["tensors"]
        ]
        options |= {"tensors": quantized, "file_type": "Q8_0"}
        assert header_bytes(**options) == known - data
    assert [padded(n) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]


def test_tensors_are_read_once_in_order_and_released(tiny: dict, tmp_path: Path) -> None:
    calls: list[str] = []
    alive: list[weakref.ref] = []

    def reading(entry: TensorEntry) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            assert all(reference() is None for reference in alive)
            calls.append(entry.name)
            data = np.array(entry.read())
            alive.append(weakref.ref(data))
            return data

        return read

    tiny["tensors"] = [replace(entry, read=reading(entry)) for entry in tiny["tensors"]]
    write_gguf(tmp_path / "m.gguf", **tiny)
    assert calls == [entry.name for entry in tiny["tensors"]]


def test_tensors_that_are_not_contiguous(tiny: dict, tmp_path: Path) -> None:
    write_gguf(tmp_path / "a", **tiny)
    tiny["tensors"] = [
        replace(entry, read=lambda entry=entry: np.asfortranarray(entry.read()))
        for entry in tiny["tensors"]
    ]
    write_gguf(tmp_path / "b", **tiny)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def with_entry(tiny: dict, target: str, /, **changes: Any) -> dict[str, Any]:
    tensors = [replace(e, **changes) if e.name == target else e for e in tiny["tensors"]]
    return {**tiny, "tensors": tensors}


DATA = {
    "float64": np.zeros((64, 64)),
    "float16": np.zeros((64, 64), np.float16),
    "transposed": np.zeros((32, 64), np.float32),
    "flat": np.zeros(64 * 64, np.float32),
}


@pytest.mark.parametrize("kind", DATA)
def test_floats_that_are_not_what_the_entry_says(tiny: dict, tmp_path: Path, kind: str) -> None:
    arguments = with_entry(tiny, "blk.0.attn_q.weight", read=lambda: DATA[kind])
    with pytest.raises(VerificationError, match=r"blk\.0\.attn_q\.weight"):
        write_gguf(tmp_path / "m.gguf", **arguments)


@pytest.mark.parametrize("shape", [(64, 35), (63, 36), (64 * 36,)])
def test_bytes_that_are_not_what_the_entry_says(tiny: dict, tmp_path: Path, shape: tuple) -> None:
    data = np.zeros(shape, np.uint8)
    arguments = with_entry(tiny, "blk.0.attn_q.weight", type="Q4_0", read=lambda: data)
    with pytest.raises(VerificationError, match="uint8"):
        write_gguf(tmp_path / "m.gguf", **arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tiny: dict, tmp_path: Path, value: float) -> None:
    data = np.zeros((64, 64), np.float32)
    data[3, 5] = value
    arguments = with_entry(tiny, "blk.0.attn_q.weight", read=lambda: data)
    with pytest.raises(InputError, match=r"attn_q.*finite"):
        write_gguf(tmp_path / "m.gguf", **arguments)


def test_weights_beyond_fp16(tiny: dict, tmp_path: Path) -> None:
    data = np.full((64, 64), 65520, np.float32)
    arguments = with_entry(tiny, "blk.0.attn_q.weight", type="F16", read=lambda: data)
    with pytest.raises(InputError, match="F16"):
        write_gguf(tmp_path / "m.gguf", **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "x" * 64}, UnsupportedError, "63 bytes"),
        ({"name": ""}, UnsupportedError, "63 bytes"),
        ({"name": "token_embd.weight"}, InputError, "twice"),
        ({"name": "blk.0.other.weight"}, InputError, "missing"),
        ({"type": "Q3_0"}, UnsupportedError, "Q3_0"),
        ({"type": "Q6_K"}, UnsupportedError, "256"),
        ({"shape": ()}, InputError, "shape"),
        ({"shape": (0, 64)}, InputError, "shape"),
    ],
)
def test_entries_that_make_no_file(
    tiny: dict, tmp_path: Path, change: dict, error: type[Exception], message: str
) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(error, match=message):
        write_gguf(path, **with_entry(tiny, "blk.0.attn_q.weight", **change))
    assert not path.exists()


@pytest.mark.parametrize("key", ["tokenizer.x", "general.architecture", "general.file_type", "x"])
def test_provenance_keys(tiny: dict, tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match=key):
        write_gguf(tmp_path / "m.gguf", **tiny, provenance={key: "x"})


def test_text_that_is_not_unicode(tiny: dict, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"piso\.x"):
        write_gguf(tmp_path / "m.gguf", **tiny, provenance={"piso.x": "\ud800"})


def test_vocabulary_of_another_size(tiny: dict, tmp_path: Path) -> None:
    vocabulary = demo_vocabulary({"vocab_size": 4096})
    with pytest.raises(InputError, match="4096 tokens"):
        write_gguf(tmp_path / "m.gguf", **{**tiny, "vocabulary": vocabulary})


@pytest.mark.parametrize("name", ["Phi-3-llama", "my-phi3", "modern-bert"])
def test_names_that_change_the_tokenizer(tiny: dict, tmp_path: Path, name: str) -> None:
    write_gguf(tmp_path / "m.gguf", **tiny, name=name)
    vocabulary = demo_vocabulary({"vocab_size": 4096})
    tiny["config"] = {**tiny["config"], "vocab_size": 4096}
    with pytest.raises(UnsupportedError, match=name):
        write_gguf(tmp_path / "m.gguf", **{**tiny, "vocabulary": vocabulary}, name=name)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 4.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
UNWRITABLE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "graph": ({"config": {"hidden_act": "gelu"}}, UnsupportedError, "gelu"),
    # transformers 5 writes rope_parameters; both at once would be another error.
    "rope": (
        {"config": {"rope_parameters": None, "rope_scaling": LLAMA3}},
        InputError,
        "low_freq_factor",
    ),
    "inventory": ({"config": {"num_hidden_layers": 2}}, InputError, "missing"),
    "extra": ({"names": ["blk.0.x.weight"]}, UnsupportedError, "does not use"),
    "twice": ({"names": ["token_embd.weight"]}, InputError, "listed twice"),
    "long": ({"names": ["x" * 64]}, UnsupportedError, "63 bytes"),
    "model-name": ({"name": "\ud800"}, InputError, r"general\.name is not valid Unicode"),
    "telling-name": ({"name": "my-phi3"}, UnsupportedError, "my-phi3"),
    "rows": ({"config": {"vocab_size": 4097}}, InputError, "4096 tokens"),
    "template": ({"vocabulary": {"chat_template": "\ud800"}}, InputError, "chat_template is not"),
    "templates": (
        {"vocabulary": {"chat_templates": {"rag": "\ud800"}}},
        InputError,
        r"chat_template\.rag is not",
    ),
    "token": ({"vocabulary": {"merges": ("a \ud800",)}}, InputError, "merges is not"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_is_refused_before_there_are_data(tiny: dict, tmp_path: Path, case: str) -> None:
    changes, error, message = UNWRITABLE[case]
    config = {**tiny["config"], "vocab_size": 4096}
    vocabulary = demo_vocabulary(config)
    names = [entry.name for entry in tiny["tensors"]]
    check_writable(config, None, names)
    check_writable(config, vocabulary, names, "a name")

    config = {**config, **changes.get("config", {})}
    vocabulary = replace(vocabulary, **changes.get("vocabulary", {}))
    names += changes.get("names", [])
    name = changes.get("name", "")
    with pytest.raises(error, match=message):
        check_writable(config, vocabulary, names, name)
    tensors = [TensorEntry(name, "F32", (1, 1), unread) for name in names]
    path = tmp_path / "m.gguf"
    with pytest.raises(error, match=message):
        write_gguf(
            path,
            config=config,
            vocabulary=vocabulary,
            tensors=tensors,
            file_type="F32",
            name=name,
        )
    assert not path.exists()


def unread() -> np.ndarray:
    raise AssertionError("read although the file cannot be written")


@pytest.mark.parametrize("path", ["missing/m.gguf", "."])
def test_paths_that_cannot_be_written(tiny: dict, tmp_path: Path, path: str) -> None:
    with pytest.raises(ResourceError, match="cannot write"):
        write_gguf(tmp_path / path, **tiny)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk(tiny: dict) -> None:
    with pytest.raises(ResourceError, match="cannot write"):
        write_gguf(Path("/dev/full"), **tiny)


def test_a_disk_that_fills_up_while_syncing(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match="No space left"):
        write_gguf(tmp_path / "m.gguf", **tiny)


def test_errors_of_the_source_stay_what_they_are(tiny: dict, tmp_path: Path) -> None:
    def read() -> np.ndarray:
        raise FileNotFoundError("shard")

    with pytest.raises(FileNotFoundError, match="shard"):
        write_gguf(tmp_path / "m.gguf", **with_entry(tiny, "blk.0.attn_q.weight", read=read))


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, exporters.gguf; print({'torch', 'numpy', 'gguf'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
    assert all(hasattr(exporters.gguf, name) for name in exporters.gguf.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        exporters.gguf.nothing  # noqa: B018
