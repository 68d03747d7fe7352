"""llama-quantize's mixes: which ggml type each matrix of a file gets.

The rules are those of `llama_tensor_get_type_impl` (llama.cpp, src/llama-quant.cpp, 2026) for
dense llama-like models that are given an importance matrix, so that a file of ours has the size of
llama-quantize's.
"""

from __future__ import annotations

from dataclasses import dataclass

BASES = {
    **{name: name for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K", "Q2_0")},
    **{name: name for name in ("TQ1_0", "TQ2_0", "IQ4_NL", "IQ4_XS", "MXFP4", "Q2_K")},
    "Q2_K_S": "Q2_K",
    **{f"Q3_K_{size}": "Q3_K" for size in "SML"},
    **{f"Q4_K_{size}": "Q4_K" for size in "SM"},
    **{f"Q5_K_{size}": "Q5_K" for size in "SM"},
}
"""The type that each mix is mostly made of."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Types whose name means a mix, unless a pure file is asked for."""

MANY_QUERIES_PER_KEY = 4
"""Query heads per key head from which values, being few, get more bits."""

WIDE_BLOCK = 256


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


def mix_type(name: str, matrix: Matrix) -> str:
    """Type of a decoder matrix.

    Args:
        name: A mix, or a type that stands for one.
        matrix: The matrix.
    """
    mix = ALIASES.get(name, name)
    rules = {"attn_v": _values, "attn_output": _attention_output, "ffn_down": _down}
    rule = rules.get(matrix.name)
    return (rule(mix, matrix) if rule else None) or BASES[mix]


def head_type(name: str, width: int) -> str:
    """Type of the output head, and of an embedding that is tied to it."""
    if width % WIDE_BLOCK or base_type(name) == "Q8_0":
        return "Q8_0"
    return "Q6_K"


def embedding_type(name: str) -> str:
    """Type of a token embedding of its own."""
    base = base_type(name)
    return "Q4_K" if base in ("TQ1_0", "TQ2_0", "Q2_0") else base


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
        return {"Q2_K_S": "Q4_K", "IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}.get(mix) or _always(mix)
    return _always(mix)


def _always(mix: str) -> str | None:
    return "Q5_K" if mix == "Q3_K_L" else None


def _attention_output(mix: str, matrix: Matrix) -> str | None:
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix)


def _down(mix: str, matrix: Matrix) -> str | None:
    first_eighth = matrix.block < matrix.n_blocks // 8
    if mix == "Q3_K_M":
        return "Q5_K" if matrix.block < matrix.n_blocks // 16 else "Q4_K"
    if mix in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if matrix.outer else None
    if first_eighth:
        early = {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K", "Q4_0": "Q4_1", "Q5_0": "Q5_1"}
        if mix in early:
            return early[mix]
    return {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}.get(mix)
