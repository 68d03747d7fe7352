"""llama-quantize's mixes: which ggml type each matrix of a file gets.

The rules are those of `llama_tensor_get_type_impl` (llama.cpp, src/llama-quant.cpp, 2026) for
dense llama-like models that are given an importance matrix, so that a file of ours has the size of
llama-quantize's.
"""

from __future__ import annotations

from dataclasses import dataclass

BASES = {
    **{name: name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "Q2_0")},
    **{name: name for name in ("TQ1_0", "TQ2_0", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "Q2_K")},
    "Q2_K_S": "Q2_K",
    **{f"Q3_K_{size}": "Q3_K" for size in "SML"},
    **{f"Q4_K_{size}": "Q4_K" for size in "SM"},
    **{f"Q5_K_{size}": "Q5_K" for size in "SM"},
    **{name: name for name in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ3_S")},
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
}
"""The type that each mix is mostly made of."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Types whose name means a mix, unless a pure file is asked for."""

SMALL = {"IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
"""Mixes below 3 bits, and the type of their embeddings and first down projections, and of values
that are not few."""

MANY_QUERIES_PER_KEY = 4
"""Query heads per key head from which values, being few, get more bits."""

WIDE_BLOCK = 256

_TYPES_NAMED_LIKE_MIXES = ("IQ2_S",)
"""Where llama-quantize's mix is mostly made of another type."""


@dataclass(frozen=True)
class Matrix:
    """What the rules look at.

    Attributes:
        name: GGUF name without ``blk.N.`` and ``.weight``: ``attn_v``, ``ffn_down``, ...
        block: Decoder block.
        n_blocks: Their number.
        queries_per_key: Query heads per key head.
    """

    name: str
    block: int
    n_blocks: int
    queries_per_key: float

    @property
    def outer(self) -> bool:
        """In the first or last eighth of the blocks, or every third of those between."""
        eighth = self.n_blocks // 8
        return (
            self.block < eighth
            or self.block >= 7 * self.n_blocks // 8
            or (self.block - eighth) % 3 == 2
        )


def base_type(name: str) -> str:
    """The type that most matrices of a mix, or of a pure file, have."""
    return BASES.get(ALIASES.get(name, name), name)


def pure_type(name: str) -> str:
    """The type of all matrices if no mix is wanted: a type of that name, not the mix."""
    return name if name in _TYPES_NAMED_LIKE_MIXES else base_type(name)


def mix_type(name: str, matrix: Matrix) -> str:
    """Type of a decoder matrix.

    Args:
        name: A mix, or a type that stands for one.
        matrix: The matrix.
    """
    mix = ALIASES.get(name, name)
    rules = {
        "attn_v": _values,
        "attn_output": _attention_output,
        "ffn_down": _down,
        **dict.fromkeys(("attn_q", "attn_k"), _queries_and_keys),
        **dict.fromkeys(("ffn_gate", "ffn_up"), _gate_and_up),
    }
    rule = rules.get(matrix.name)
    return (rule(mix, matrix) if rule else None) or BASES[mix]


def head_type(name: str, width: int) -> str:
    """Type of the output head, and of an embedding that is tied to it."""
    if width % WIDE_BLOCK or base_type(name) == "Q8_0":
        return "Q8_0"
    return "Q5_K" if name in SMALL or name == "IQ3_XXS" else "Q6_K"


def embedding_type(name: str) -> str:
    """Type of a token embedding of its own.

    llama-quantize has no mix NVFP4. A token embedding cannot be of that type, whose scale of a
    whole tensor multiplies outputs of linears; IQ4_NL takes as many bits.
    """
    base = base_type(name)
    if name in SMALL or name == "IQ3_XXS":
        return SMALL.get(name, "IQ3_S")
    own = {"TQ1_0": "Q4_K", "TQ2_0": "Q4_K", "Q2_0": "Q4_K", "NVFP4": "IQ4_NL"}
    return own.get(base, base)


def _values(mix: str, matrix: Matrix) -> str | None:
    many = matrix.queries_per_key >= MANY_QUERIES_PER_KEY
    if mix == "Q2_K":
        return "Q4_K" if many else "Q3_K"
    if mix == "Q3_K_M":
        return "Q5_K" if matrix.block < 2 else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if matrix.outer else None
    if mix == "Q4_K_S":
        return "Q5_K" if matrix.block < 4 else None
    if many:
        found = {"Q2_K_S": "Q4_K", "IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}.get(mix)
        of_codebooks = mix in SMALL or mix in ("IQ3_XXS", "IQ3_XS", "IQ3_S")
        return found or ("Q4_K" if of_codebooks else _always(mix))
    return SMALL.get(mix) or _always(mix)


def _always(mix: str) -> str | None:
    return {"Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(mix)


def _queries_and_keys(mix: str, matrix: Matrix) -> str | None:
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix)


def _gate_and_up(mix: str, matrix: Matrix) -> str | None:
    inner = matrix.n_blocks // 8 <= matrix.block < 7 * matrix.n_blocks // 8
    return "IQ3_XXS" if mix == "IQ3_XS" and inner else None


def _attention_output(mix: str, matrix: Matrix) -> str | None:
    found = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(mix)
    return found or ("IQ3_S" if mix in ("IQ2_S", "IQ2_M", "IQ3_XXS") else None)


def _down(mix: str, matrix: Matrix) -> str | None:
    first_eighth = matrix.block < matrix.n_blocks // 8
    if mix == "Q3_K_M":
        return "Q5_K" if matrix.block < matrix.n_blocks // 16 else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if matrix.outer else None
    if first_eighth:
        early = {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K", "Q4_0": "Q4_1", "Q5_0": "Q5_1"}
        early |= {"IQ3_M": "Q4_K", **SMALL}
        if mix in early:
            return early[mix]
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(mix)
