"""The transformers objects of a checkpoint: config and tokenizer, never any code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.architectures import rope_parameters
from pipeline.checkpoint.checkpoint import Checkpoint
from pipeline.checkpoint.files import LEAD_BYTES, refuse_stand_in
from pipeline.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

# All that may pass from a stranger's config.json into transformers: numbers and flags of the
# model itself. Other keys can make transformers fetch kernels or import modules.
CONFIG_KEYS = (
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "mlp_bias",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def hf_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The transformers config of a checkpoint, the same under transformers 4 and 5.

    It names no dtype: whoever builds the model decides.

    Raises:
        InputError: transformers finds the values wrong.
    """
    import transformers

    config, size = checkpoint.config, checkpoint.architecture.dimensions(checkpoint.config)
    values: dict[str, Any] = {key: config[key] for key in CONFIG_KEYS if key in config}
    values |= {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
    }
    rope = rope_parameters(config)
    if int(transformers.__version__.partition(".")[0]) >= 5:
        values["rope_parameters"] = rope
    else:
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config_class = getattr(transformers, f"{checkpoint.architecture.class_prefix}Config")
    try:
        return config_class(**values)
    except Exception as error:  # transformers 5 raises its own kind, not a ValueError
        raise InputError(
            f"transformers rejects the config of {checkpoint.source}", why=str(error)
        ) from error


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a checkpoint, from local files and without remote code.

    Raises:
        InputError: A tokenizer file is not what its name says, or ids exceed the embedding.
        UnsupportedError: No fast tokenizer can be made from the files.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        path = checkpoint.folder / name
        if path.exists():
            with path.open("rb") as file:
                refuse_stand_in(path, file.read(LEAD_BYTES))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(checkpoint.folder), trust_remote_code=False, local_files_only=True, use_fast=True
        )
    except Exception as error:  # transformers and its Rust parts raise almost anything here
        raise _no_tokenizer(checkpoint, f"{type(error).__name__}: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise _no_tokenizer(checkpoint, "transformers only has a slow tokenizer for it")
    rows = checkpoint.architecture.dimensions(checkpoint.config).vocab
    top = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= top < rows:
        raise InputError(
            f"the tokenizer of {checkpoint.source} has ids up to {top}, the embedding {rows} rows",
            why="tokenizer and weights do not belong together, or a token was added without a row",
        )
    return tokenizer


def _no_tokenizer(checkpoint: Checkpoint, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"no fast tokenizer can be made for {checkpoint.source}",
        why=why,
        fix="add a tokenizer.json to the model folder (save_pretrained of a fast tokenizer)",
    )
