"""Which tensors a file must hold. llama.cpp does without some of them and says nothing."""

from __future__ import annotations

from collections.abc import Collection

from exporters.gguf.fields import Config, integer
from exporters.gguf.names import scale_name, why_unscaled
from exporters.gguf.rope import rope_factors
from pipeline.errors import InputError, UnsupportedError

_LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_NORMS = ("attn_norm", "ffn_norm")
_HEAD_NORMS = ("attn_q_norm", "attn_k_norm")


def check_inventory(config: Config, names: Collection[str]) -> None:
    """Checks that the tensors of a file are those of its model.

    A missing head would be replaced by the embedding, a missing bias or ``rope_freqs`` left out,
    without a word.

    Raises:
        InputError: A tensor of the model is missing.
        UnsupportedError: A tensor that the graph of this architecture does not use.
    """
    required, optional = _expected(config)
    missing = sorted(required - set(names))
    if missing:
        raise InputError(
            f"{len(missing)} tensors of the model are missing: {', '.join(missing[:5])}",
            why="llama.cpp would refuse the file, or compute without them",
        )
    unknown = sorted(set(names) - required - optional)
    if unknown:
        raise UnsupportedError(
            f"{len(unknown)} tensors that llama.cpp does not use: {', '.join(unknown[:5])}",
            why=f"they are not part of its {config['model_type']} graph for this config",
        )


def _expected(config: Config) -> tuple[set[str], set[str]]:
    """Names that must be in the file, and names that may be."""
    kind = config["model_type"]
    weights = [*_NORMS, *_LINEARS, *(_HEAD_NORMS if kind == "qwen3" else ())]
    biases = {
        "attn_q": kind == "qwen2" or config.get("attention_bias"),
        "attn_k": kind == "qwen2" or config.get("attention_bias"),
        "attn_v": kind == "qwen2" or config.get("attention_bias"),
    }
    if kind == "llama":
        biases["attn_output"] = config.get("attention_bias")
        biases.update(dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), config.get("mlp_bias")))

    required, optional = {"token_embd.weight", "output_norm.weight"}, set[str]()
    (optional if config.get("tie_word_embeddings", False) else required).add("output.weight")
    optional.add(scale_name("output.weight"))
    if rope_factors(config) is not None:
        required.add("rope_freqs.weight")
    for block in range(integer(config, "num_hidden_layers")):
        required.update(f"blk.{block}.{name}.weight" for name in weights)
        for name, needed in biases.items():
            (required if needed else optional).add(f"blk.{block}.{name}.bias")
        for weight in (f"blk.{block}.{name}.weight" for name in _LINEARS):
            biased = f"{weight.removesuffix('weight')}bias" in required
            if why_unscaled(config, weight, biased=biased) is None:
                optional.add(scale_name(weight))
    return required, optional
