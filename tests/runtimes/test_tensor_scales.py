"""Scales of whole tensors: what stock llama.cpp does with them, and that the emulator does it too.

Doubling is exact, so it makes no difference to a bit whether the bytes of NVFP4's own scales say it
or the tensor's scale does: where llama.cpp multiplies by the latter, logits are identical.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ggml_library
import numpy as np
import pytest
import torch
from tiny_gguf import random_model, write
from torch import Tensor
from transformers import PreTrainedModel

from exporters.gguf.names import why_unscaled
from pipeline.errors import InputError, UnsupportedError, VerificationError
from runtimes import llamacpp
from runtimes.ggml_emulator import GGMLEmulator
from runtimes.gguf_weights import GGUFWeights

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOKENS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))


def packed_linear(model: PreTrainedModel, name: str) -> np.ndarray:
    """A linear in NVFP4 by the C library, whose scales can all be doubled in their bytes."""
    layers = dict(model.named_parameters())
    full = "lm_head" if name == "output" else f"model.layers.0.{LINEARS[name.split('.')[2]]}"
    raw = ggml_library.quantize(layers[f"{full}.weight"].detach().numpy(), "NVFP4")
    scales = raw.reshape(-1, 36)[:, :4]
    assert scales.min() >= 8
    assert scales.max() < 0x70
    return raw


def doubled(raw: np.ndarray) -> np.ndarray:
    """The same rows times 2."""
    blocks = raw.reshape(-1, 36).copy()
    blocks[:, :4] += 8
    return blocks.reshape(raw.shape)


def pair(folder: Path, model: PreTrainedModel, name: str) -> Iterator[Path]:
    """A file without, with doubled bytes, and with a tensor scale of 2."""
    raw = packed_linear(model, name)
    two = {f"{name}.scale": np.full(1, 2, np.float32)}
    for n, (rows, scale) in enumerate([(raw, {}), (doubled(raw), {}), (raw, two)]):
        packed = {f"{name}.weight": (rows, "NVFP4")}
        yield write(folder / f"{n}.gguf", model, tensors=scale, packed=packed)


def by_llamacpp(path: Path) -> Tensor:
    with llamacpp.LlamaCpp(path) as runner:
        return torch.stack(list(runner.logits(TOKENS, 0)))


def emulated(path: Path, **options: Any) -> Tensor:
    with GGMLEmulator(path, **options) as emulator:
        return torch.stack(list(emulator.logits(TOKENS, 0)))


@pytest.mark.parametrize("name", ["output", *(f"blk.0.{linear}" for linear in LINEARS)])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen2", {}),
        pytest.param("llama", {}, marks=pytest.mark.slow),
        pytest.param("llama", {"attention_bias": True}, marks=pytest.mark.slow),
        pytest.param("qwen3", {"head_dim": 32}, marks=pytest.mark.slow),
    ],
)
def test_llamacpp_multiplies_by_it_where_we_say_so(
    architecture: str, options: dict[str, Any], name: str, tmp_path: Path
) -> None:
    """Before the bias where there is one: queries, keys and values of qwen2, attention of llama."""
    pytest.importorskip("llama_cpp")
    model = random_model(architecture, **SIZES, **options)
    plain, twice, scaled = pair(tmp_path, model, name)
    biased = options.get("attention_bias", False) and "attn" in name
    reason = why_unscaled({"model_type": architecture}, f"{name}.weight", biased=biased)
    expected = by_llamacpp(twice)
    assert not torch.equal(expected, by_llamacpp(plain))
    assert torch.equal(by_llamacpp(scaled), expected) == (reason is None)
    if reason is not None:
        assert torch.equal(by_llamacpp(scaled), by_llamacpp(plain))
        with pytest.raises(UnsupportedError, match=f"'{name}.scale' has no place"):
            GGMLEmulator(scaled)
        return
    assert torch.equal(emulated(scaled), emulated(twice))
    ours = emulated(scaled)
    missed = (ours - expected).norm(dim=-1)
    rounding = (ours - emulated(scaled, round_activations=False)).norm(dim=-1)
    assert missed.median() < 1e-3 * rounding.median()  # where no rounding of an activation flips


@pytest.mark.parametrize("linear", ["ffn_gate", "ffn_up", "ffn_down"])
def test_biases_of_the_ffn_stop_llamacpp(linear: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model, name = random_model("llama", **SIZES, mlp_bias=True), f"blk.0.{linear}"
    assert why_unscaled({"model_type": "llama"}, f"{name}.weight", biased=True) is not None
    plain, twice, scaled = pair(tmp_path, model, name)
    assert not torch.equal(by_llamacpp(plain), by_llamacpp(twice))
    with pytest.raises(VerificationError, match=r"llama\.cpp"):
        by_llamacpp(scaled)
    with pytest.raises(UnsupportedError, match="has no place"):
        GGMLEmulator(scaled)


@pytest.mark.parametrize("tied", [False, True])
def test_llamacpp_knows_none_for_the_embedding(tied: bool, tmp_path: Path) -> None:
    """Nor for a head that is the embedding."""
    pytest.importorskip("llama_cpp")
    model = random_model("llama", **SIZES, tie_word_embeddings=tied)
    assert why_unscaled({"model_type": "llama"}, "token_embd.weight", biased=False) is not None
    weight = model.model.embed_tokens.weight.detach().numpy()
    packed = {"token_embd.weight": (ggml_library.quantize(weight, "NVFP4"), "NVFP4")}
    path = write(tmp_path / "plain.gguf", model, packed=packed)
    assert torch.isfinite(by_llamacpp(path)).all()
    for name in ["token_embd.scale", *(["output.scale"] if tied else [])]:
        scale = {name: np.full(1, 2, np.float32)}
        path = write(tmp_path / "scaled.gguf", model, tensors=scale, packed=packed)
        with pytest.raises((InputError, VerificationError), match=r"llama\.cpp"):
            by_llamacpp(path)
        with pytest.raises(UnsupportedError, match="has no place"):
            GGMLEmulator(path)


def test_weights_are_read_with_it(tmp_path: Path) -> None:
    model, name = random_model("llama", **SIZES), "blk.0.attn_q"
    read = []
    for path in pair(tmp_path, model, name):
        weights = GGUFWeights(path, {"model_type": "llama", "num_attention_heads": 4})
        read.append((weights.tensor_scale(f"{name}.weight"), weights.decode(f"{name}.weight")))
        assert torch.equal(weights.read("model.norm.weight"), model.model.norm.weight)
        weights.close()
    (_, plain), (one, twice), (two, scaled) = read
    assert (one, two) == (1, 2)
    assert torch.equal(2 * plain, twice)
    assert torch.equal(scaled, twice)


def test_a_scale_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = random_model("llama", **SIZES)
    scale = {"blk.0.attn_q.scale": np.ones(2, np.float32)}
    path = write(tmp_path / "model.gguf", model, tensors=scale)
    with pytest.raises(InputError, match=r"is \[2\], expected \[1\]"):
        GGMLEmulator(path)
    weights = GGUFWeights(path, {"model_type": "llama"})
    with pytest.raises(InputError, match=r"is \[2\], expected \[1\]"):
        weights.decode("blk.0.attn_q.weight")
    weights.close()
