"""The PyTorch emulator against stock llama.cpp and against transformers."""

import time
from pathlib import Path
from typing import Any

import ggml_library
import gguf
import numpy as np
import pytest
import torch
from comparing import compare
from tiny_gguf import random_model, write
from torch import Tensor

from exporters.gguf.reader import open_gguf
from pipeline.errors import InputError, PipelineError, UnsupportedError
from runtimes import llamacpp
from runtimes.base import Runtime
from runtimes.ggml_emulator import GGMLEmulator

BOS = 0
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def windows(demo_ids: list[int]) -> Tensor:
    tokens = torch.tensor(demo_ids[: 8 * 128]).reshape(8, 128)
    tokens[:, 0] = BOS
    return tokens


@pytest.fixture(scope="module")
def quantized(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Demo model by llama.cpp's own quantizer, made once a type."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(type_name: str) -> Path:
        path = folder / type_name
        if not path.exists() and type_name == "NVFP4":
            write_nvfp4(demo_gguf, path)
        if not path.exists():
            embedding = "Q6_K" if type_name == "Q6_K" else "Q8_0"
            mixes = {f"Q{bits}_K": f"Q{bits}_K_S" for bits in (3, 4, 5)} | {"MXFP4": "MXFP4_MOE"}
            kind = mixes.get(type_name, type_name)
            options = {"imatrix": even_importances(demo_gguf)} if kind.startswith("IQ") else {}
            llamacpp.quantize(
                demo_gguf, path, kind, pure=True, token_embedding_type=embedding, **options
            )
        return path

    return make


def even_importances(path: Path) -> dict[str, np.ndarray]:
    """What the types with codebooks cannot be made without."""
    matrices = [t for t in gguf.GGUFReader(path).tensors if t.name.startswith("blk")]
    return {t.name: np.ones(t.shape[0], np.float32) for t in matrices if len(t.shape) == 2}


def relative_rms(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """One value a window."""
    pairs = zip(ours, theirs, strict=True)
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs])


def test_float_file_equals_llamacpp(demo_gguf: Path, windows: Tensor) -> None:
    with GGMLEmulator(demo_gguf) as emulator, llamacpp.LlamaCpp(demo_gguf) as stock:
        found = compare(stock.logits(windows, 0), emulator.logits(windows, 0), windows, 0)
    assert abs(found.delta_nll) < 1e-6
    assert found.kld_mean < 1e-10


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0"])
def test_float_mode_equals_llamacpp_on_the_twin(
    type_name: str, quantized: Any, windows: Tensor, tmp_path: Path
) -> None:
    """The twin holds the same weights in F32, decoded by the `gguf` package."""
    path, twin = quantized(type_name), tmp_path / "twin.gguf"
    write_twin(path, twin)
    with GGMLEmulator(path, round_activations=False) as emulator:
        ours = list(emulator.logits(windows, 0))
    found = compare(llamacpp.LlamaCpp(twin).logits(windows, 0), ours, windows, 0)
    assert abs(found.delta_nll) < 1e-5
    assert found.kld_mean < 1e-10


@pytest.mark.parametrize(
    "type_name",
    [
        *("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_0", "Q6_K", "BF16", "F16", "Q5_1", "MXFP4", "IQ4_NL"),
        "NVFP4",
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "IQ4_XS", "TQ1_0", "TQ2_0"),
        *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    ],
)
def test_rounding_is_that_of_llamacpp(type_name: str, quantized: Any, demo_ids: list[int]) -> None:
    """Single positions: nearly all agree to float32 noise, where the float twin is 1 % off.

    In longer windows this cannot be seen: a difference in the last bit flips the rounding of a few
    activations, and a few tokens later everything differs by about as much as the rounding itself.
    """
    path = quantized(type_name)
    tokens = torch.tensor(demo_ids).unique()[:120, None].expand(-1, 2).contiguous()
    theirs = list(llamacpp.LlamaCpp(path).logits(tokens, 0))
    with GGMLEmulator(path) as emulator:
        rounded = relative_rms(list(emulator.logits(tokens, 0)), theirs)
    with GGMLEmulator(path, round_activations=False) as emulator:
        plain = relative_rms(list(emulator.logits(tokens, 0)), theirs)
    least = 0.25 if type_name == "F16" else 0.75  # F16 rounds finely, so flips are many but small
    assert (rounded < 1e-6).float().mean() > least
    assert plain.min() > 1e-3


@pytest.mark.parametrize("type_name", ["Q8_0", "Q6_K"])
def test_rounding_predicts_the_size_of_the_kernel_error(
    type_name: str, quantized: Any, windows: Tensor
) -> None:
    path = quantized(type_name)
    with GGMLEmulator(path, round_activations=False) as emulator:
        twin = list(emulator.logits(windows, 0))
    with GGMLEmulator(path) as emulator:
        predicted = compare(twin, emulator.logits(windows, 0), windows, 0)
    measured = compare(twin, llamacpp.LlamaCpp(path).logits(windows, 0), windows, 0)
    assert predicted.kld_mean == pytest.approx(measured.kld_mean, rel=0.2)


MODEL_CASES: list[tuple[str, dict[str, Any], dict[str, int | float | str]]] = [
    ("llama", {}, {}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 24, "mlp_bias": True}, {}),
    ("llama", {"attention_bias": True, "num_key_value_heads": 4}, {}),
    ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}, {}),
    (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
    ),
    ("qwen2", {}, {}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}, {}),
    (
        "qwen2",
        {"rope_scaling": YARN, "rope_theta": 1000.0},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
    ("qwen3", {"head_dim": 32}, {}),
    ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1e6}, {}),
]


@pytest.mark.parametrize(("architecture", "options", "metadata"), MODEL_CASES)
def test_random_models_equal_transformers_and_llamacpp(
    architecture: str, options: dict[str, Any], metadata: dict[str, Any], tmp_path: Path
) -> None:
    model = random_model(architecture, **options)
    tensors = {}
    if options.get("rope_scaling") == LLAMA3:
        plain = random_model(architecture, rope_theta=options["rope_theta"])
        factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
        assert factors.max() > 2
        tensors["rope_freqs.weight"] = factors.numpy()
    path = write(tmp_path / "tiny.gguf", model, metadata, tensors)
    tokens = torch.randint(96, (3, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        reference = list(model(tokens).logits[:, :-1])
    with GGMLEmulator(path, round_activations=False) as emulator:
        ours = list(emulator.logits(tokens, 0))
        assert isinstance(emulator, Runtime)
        scored = list(emulator.logits(tokens, 150))
    assert relative_rms(ours, reference).max() < 1e-4
    for whole, tail in zip(ours, scored, strict=True):
        torch.testing.assert_close(tail, whole[150:])
    if llamacpp.available():
        theirs = list(llamacpp.LlamaCpp(path).logits(tokens, 0))
        assert relative_rms(ours, theirs).max() < 2e-5


def test_yarn_magnitude_and_old_linear_key_as_llamacpp(tmp_path: Path) -> None:
    """Cases that transformers does not have or names otherwise."""
    pytest.importorskip("llama_cpp")
    tokens = torch.randint(96, (2, 200), generator=torch.Generator().manual_seed(1))
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32}
    cases: list[dict[str, int | float | str]] = [
        {"rope.scale_linear": 2.0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 2.0},
        {**yarn, "rope.scaling.factor": 5.0, "rope.scaling.attn_factor": 1.3},
        {**yarn, "rope.scaling.factor": 5.0, "rope.scaling.yarn_beta_fast": 8.0},
        {**yarn, "rope.scaling.factor": 0.5},
    ]
    for case in cases:
        path = write(tmp_path / "tiny.gguf", random_model("qwen2"), case)
        with GGMLEmulator(path) as emulator:
            ours = list(emulator.logits(tokens, 0))
        theirs = list(llamacpp.LlamaCpp(path).logits(tokens, 0))
        assert relative_rms(ours, theirs).max() < 2e-5, case


def write_twin(source: Path, target: Path) -> None:
    """The same model with every tensor decoded to F32 by the `gguf` package."""
    reader = gguf.GGUFReader(source)
    writer = same_metadata(reader, target)
    for tensor in reader.tensors:
        values = tensor.data
        if tensor.tensor_type != gguf.GGMLQuantizationType.F32:
            values = gguf.quants.dequantize(values, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def same_metadata(reader: gguf.GGUFReader, target: Path) -> gguf.GGUFWriter:
    """A writer that has the hyperparameters already."""
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            value = field.contents()
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, value)
    writer.add_tokenizer_model("none")
    return writer


def write_nvfp4(source: Path, target: Path) -> None:
    """Matrices of the blocks by the C library's quantizer, each under a scale of its own."""
    reader = gguf.GGUFReader(source)
    writer = same_metadata(reader, target)
    for n, tensor in enumerate(reader.tensors):
        values = np.array(tensor.data, np.float32)
        if not tensor.name.startswith("blk") or values.ndim == 1:
            writer.add_tensor(tensor.name, values)
            continue
        scale = np.float32(2.0 ** -(6 + n % 5))
        kind = gguf.GGMLQuantizationType.NVFP4
        raw = ggml_library.quantize(values / scale, "NVFP4")
        writer.add_tensor(tensor.name, raw, raw_dtype=kind)
        writer.add_tensor(tensor.name.replace("weight", "scale"), np.array([scale]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("changes", "error", "pattern"),
    [
        ({"metadata": {"block_count": 0}}, InputError, "block_count is '0'"),
        ({"metadata": {"attention.head_count": 1.5}}, InputError, "head_count is '1.5'"),
        ({"metadata": {"attention.head_count_kv": 3}}, InputError, "cannot share"),
        ({"metadata": {"attention.key_length": 15}}, UnsupportedError, "value_length differs"),
        ({"metadata": {"rope.dimension_count": 8}}, UnsupportedError, "dimension_count differs"),
        ({"metadata": {"rope.freq_base": -1.0}}, InputError, "freq_base is '-1.0'"),
        ({"metadata": {"rope.scaling.factor": float("nan")}}, InputError, "factor is 'nan'"),
        ({"metadata": {"rope.scaling.type": "longrope"}}, UnsupportedError, "'longrope'"),
        ({"metadata": {"rope.scaling.type": "\x1b[2J"}}, UnsupportedError, r"\\x1b\[2J"),
        ({"metadata": {"expert_count": 8}}, UnsupportedError, "mixture"),
        ({"metadata": {"block_count": 2}}, InputError, "no tensor blk.1"),
        ({"metadata": {"block_count": (1 << 31) - 1}}, InputError, "cannot be made of"),
        ({"metadata": {"rope.freq_base": 1.0}}, InputError, "expected more than 1"),
        ({"metadata": {"embedding_length": 32}}, InputError, "expected"),
        ({"drop": ("context_length",)}, InputError, "context_length is missing"),
        ({"drop": ("attention.layer_norm_rms_epsilon",)}, InputError, "epsilon is missing"),
        ({"drop": ("token_embd.weight",)}, InputError, "no matrix token_embd"),
        ({"drop": ("blk.0.ffn_up.weight",)}, InputError, "no tensor blk.0.ffn_up"),
        (
            {"tensors": {"blk.0.ffn_up.scale": np.ones(1, np.float32)}},
            UnsupportedError,
            "'blk.0.ffn_up.scale' has no place in the qwen2 graph",
        ),
        (
            {"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}},
            UnsupportedError,
            "no place",
        ),
        (
            {"tensors": {"output_norm.weight": np.ones(65, np.float32)}},
            InputError,
            r"is \[65\], expected \[64\]",
        ),
        (
            {"tensors": {"output_norm.weight": np.ones(64, np.int32)}},
            UnsupportedError,
            "no decoder for ggml type I32",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    changes: dict[str, Any], error: type[Exception], pattern: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", random_model("qwen2"), **changes)
    with pytest.raises(error, match=pattern):
        GGMLEmulator(path)


def test_other_architectures_and_tokens_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="architecture 'mamba'"):
        GGMLEmulator(tmp_path / "other.gguf")
    with GGMLEmulator(write(tmp_path / "tiny.gguf", random_model("qwen2"))) as emulator:
        with pytest.raises(InputError, match="outside the vocabulary of 96"):
            emulator.logits(torch.tensor([[0, 96]]), 0)
        with pytest.raises(InputError, match="negative token id -1"):
            emulator.logits(torch.tensor([[-1, 0]]), 0)
        with pytest.raises(InputError, match="windows are int64"):
            emulator.logits(torch.zeros(4, dtype=torch.int64), 0)
        with pytest.raises(InputError, match="nothing to score"):
            emulator.logits(torch.zeros(1, 4, dtype=torch.int64), 3)
        with pytest.raises(UnsupportedError, match="tokenizer model 'none'"):
            emulator.tokenize("text")
        assert list(emulator.logits(torch.zeros(0, 4, dtype=torch.int64), 0)) == []


def test_mutated_headers_are_refused_or_run(tmp_path: Path) -> None:
    """Nothing but a `PipelineError`, and quickly, whatever the metadata say."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    path = write(tmp_path / "tiny.gguf", random_model("qwen2", **sizes, **heads))
    whole = path.read_bytes()
    with open_gguf(path) as file:
        header = min(info.offset for info in file.tensors.values())
    rng = np.random.default_rng(0)
    ran = 0
    for _ in range(1500):
        content = bytearray(whole)
        for at in rng.integers(24, header, rng.integers(1, 4)):
            content[at] = rng.choice([0, 1, 255, content[at] ^ 1, content[at] ^ 0x80])
        path.write_bytes(content)
        start = time.perf_counter()
        try:
            with GGMLEmulator(path) as emulator:
                ran += len(list(emulator.logits(torch.arange(8)[None], 0)))
        except PipelineError:
            pass
        assert time.perf_counter() - start < 1
    assert 10 < ran < 1000
