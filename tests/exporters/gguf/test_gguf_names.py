"""Names against the mapping of the gguf package, row order against rotary embedding itself."""

import gguf
import numpy as np
import pytest

from exporters.gguf import gguf_name, pack, permute_rope, rope_heads, scale_name
from exporters.gguf.inventory import check_inventory
from pipeline.errors import InputError, UnsupportedError

MODULES = {
    "llama": "embed_tokens norm input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj "
    "self_attn.o_proj post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj",
    "qwen3": "self_attn.q_norm self_attn.k_norm",
}


@pytest.mark.parametrize(
    ("architecture", "module"), [(a, m) for a, names in MODULES.items() for m in names.split()]
)
def test_names_are_those_of_the_gguf_package(architecture: str, module: str) -> None:
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen3": gguf.MODEL_ARCH.QWEN3}[architecture]
    table = gguf.get_tensor_name_map(arch, 32)
    prefix = "model." if module in ("embed_tokens", "norm") else "model.layers.31."
    for kind in ("weight", "bias") if module.endswith("_proj") else ("weight",):
        hf_name = f"{prefix}{module}.{kind}"
        expected = table.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert gguf_name(hf_name) == expected
    assert gguf_name("lm_head.weight") == "output.weight"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.00.mlp.up_proj.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.input_layernorm.bias",
        "model.layers.0.mlp.up_proj.weight\n",
        "lm_head.bias",
        "transformer.h.0.attn.c_attn.weight",
    ],
)
def test_names_without_an_equivalent(name: str) -> None:
    with pytest.raises(UnsupportedError, match="has no tensor"):
        gguf_name(name)


def test_an_empty_name() -> None:
    with pytest.raises(InputError):
        gguf_name("")


def rotate(vector: np.ndarray, angles: np.ndarray, first: np.ndarray, second: np.ndarray):
    """Rotates the pairs (first[i], second[i]) of a vector by angles[i]."""
    turned = vector.copy()
    cos, sin = np.cos(angles), np.sin(angles)
    turned[first] = vector[first] * cos - vector[second] * sin
    turned[second] = vector[first] * sin + vector[second] * cos
    return turned


def test_interleaved_rotation_of_permuted_heads_gives_the_same_scores() -> None:
    rng, heads, size, hidden = np.random.default_rng(0), 3, 10, 12
    half, frequencies = size // 2, rng.random(size // 2)
    split = np.arange(half), np.arange(half) + half
    interleaved = 2 * np.arange(half), 2 * np.arange(half) + 1
    query, key = rng.standard_normal((2, heads * size, hidden))
    bias = rng.standard_normal(heads * size)
    x, y = rng.standard_normal((2, hidden))

    def scores(q, b, k, pairs):
        q, k = (q @ x + b).reshape(heads, size), (k @ y).reshape(heads, size)
        rotated_q = [rotate(head, 5 * frequencies, *pairs) for head in q]
        rotated_k = [rotate(head, 2 * frequencies, *pairs) for head in k]
        return [a @ b for a, b in zip(rotated_q, rotated_k, strict=True)]

    permuted = [permute_rope(rows, heads) for rows in (query, bias, key)]
    expected = scores(query, bias, key, split)
    assert np.allclose(scores(*permuted, interleaved), expected, rtol=1e-12)
    assert not np.allclose(scores(query, bias, key, interleaved), expected, rtol=1e-2)


def test_permuting_packed_rows_is_packing_permuted_rows() -> None:
    from test_gguf_packing import random_tensor

    tensor = random_tensor("Q4_0", rows=24)
    rows = permute_rope(np.arange(24), 2)
    permuted = type(tensor)(tensor.format, tensor.codes[rows], {"d": tensor.scales["d"][rows]})
    assert np.array_equal(permute_rope(pack(tensor), 2), pack(permuted))


@pytest.mark.parametrize("heads", [0, -1, 5, 12])
def test_rows_that_are_no_heads(heads: int) -> None:
    with pytest.raises(InputError, match="heads"):
        permute_rope(np.zeros((12, 4)), heads)


def test_which_tensors_are_permuted() -> None:
    config = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2}
    assert rope_heads(config, "blk.0.attn_q.weight") == 8
    assert rope_heads(config, "blk.10.attn_k.bias") == 2
    assert rope_heads({**config, "num_key_value_heads": None}, "blk.0.attn_k.weight") == 8
    for name in ("blk.0.attn_v.weight", "blk.0.attn_q_norm.weight", "output.weight"):
        assert rope_heads(config, name) is None
    assert rope_heads({**config, "model_type": "qwen3"}, "blk.0.attn_q.weight") is None


CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
}
ATTENTION = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
MLP = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
ENDS = {"token_embd.weight", "output_norm.weight", "output.weight"}
NAMES = ENDS | {f"blk.0.{name}.weight" for name in ATTENTION + MLP}


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({}, "output.weight"),
        ({}, "blk.0.ffn_up.weight"),
        ({"attention_bias": True}, "blk.0.attn_output.bias"),
        ({"mlp_bias": True}, "blk.0.ffn_gate.bias"),
        ({"model_type": "qwen2"}, "blk.0.attn_k.bias"),
        ({"model_type": "qwen3"}, "blk.0.attn_q_norm.weight"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 16,
                }
            },
            "rope_freqs.weight",
        ),
    ],
)
def test_missing_tensors(change: dict, missing: str) -> None:
    with pytest.raises(InputError, match=missing):
        check_inventory({**CONFIG, **change}, NAMES - {missing})


def test_complete_and_superfluous_tensors() -> None:
    check_inventory(CONFIG, NAMES)
    check_inventory(CONFIG, NAMES | {"blk.0.attn_q.bias", "blk.0.ffn_down.bias"})
    tied = {**CONFIG, "tie_word_embeddings": True}
    check_inventory(tied, NAMES)
    check_inventory(tied, NAMES - {"output.weight"})
    for extra in ("rope_freqs.weight", "blk.1.attn_q.weight", "blk.0.attn_q_norm.weight"):
        with pytest.raises(UnsupportedError, match=extra):
            check_inventory(CONFIG, NAMES | {extra})


def test_scales_of_tensors_are_refused_where_llamacpp_would_leave_them_out() -> None:
    linears = [f"blk.0.{name}" for name in ATTENTION + MLP if not name.endswith("norm")]
    scales = {scale_name(f"{name}.weight") for name in [*linears, "output"]}
    assert "blk.0.ffn_up.scale" in scales
    check_inventory(CONFIG, NAMES | scales)
    biases = {f"{name}.bias" for name in linears if "attn" in name}
    check_inventory({**CONFIG, "attention_bias": True}, NAMES | scales | biases)
    for extra in ("token_embd.scale", "blk.0.attn_norm.scale", "blk.1.attn_q.scale"):
        with pytest.raises(UnsupportedError, match=extra):
            check_inventory(CONFIG, NAMES | {extra})
    of_ffn = {name for name in scales if "ffn" in name}
    qwen2, qwen2_names = (
        {**CONFIG, "model_type": "qwen2"},
        NAMES | biases - {"blk.0.attn_output.bias"},
    )
    check_inventory(qwen2, qwen2_names | scales - of_ffn)
    of_mlp = {f"blk.0.{name}.bias" for name in MLP if not name.endswith("norm")}
    for name in of_ffn:
        with pytest.raises(UnsupportedError, match=name):
            check_inventory(qwen2, qwen2_names | {name})
        with pytest.raises(UnsupportedError, match=name):
            check_inventory({**CONFIG, "mlp_bias": True}, NAMES | of_mlp | {name})
