"""File formats that a run can produce, and which types each of them can hold."""

from __future__ import annotations

import re

from exporters.onnx.names import GROUPS
from pipeline.errors import UsageError
from pipeline.mixes import BASES
from pipeline.suggest import did_you_mean

TARGETS = ("gguf", "onnx")

SHARED = {(4, 32): "Q4_0", (2, 64): "Q2_0", (8, 32): "Q8_0"}
"""Types by bits and group size that both targets hold: the same integers and fp16 scales."""

BOTH = (*SHARED.values(), "MXFP4")
"""All types that both targets hold."""

GGUF_NAMES = {"INT4_G32": "Q4_0", "INT2_G64": "Q2_0"}
"""Names in GGUF of integer types; those of 8 bits differ by one level."""

FLOATS = ("F16", "F32")

DEFAULT_GROUPS = {2: 64, 3: 32, 4: 32, 8: 32}
"""Group size by bits; 2 bits in groups of 32 take ONNX Runtime more than twice as long as in 64."""

_TYPE = re.compile(r"(INT(?=[2348])|UINT(?=[234])|FINT(?=[24])|FP(?=[48]))(\d)_G([1-9]\d*)\Z")


def parse_targets(text: str) -> str:
    """Targets in canonical order, joined by commas: ``gguf``, ``onnx`` or ``gguf,onnx``.

    Raises:
        ValueError: An unknown one, or none.
    """
    wanted = [part.strip().lower() for part in text.split(",")]
    for part in wanted:
        if part not in TARGETS:
            raise ValueError(f"unknown target {part!r}; {did_you_mean(part, TARGETS)}")
    return ",".join(target for target in TARGETS if target in wanted)


def is_onnx_type(name: str) -> bool:
    """Whether a name, upper case, is a type of ONNX files with groups that are allowed there."""
    match = _TYPE.match(name)
    if match is None:
        return False
    bits = 8 if match[1] == "FP" else int(match[2])  # E2M1 is multiplied as int8
    return int(match[3]) in groups_of(bits)


def groups_of(bits: int) -> tuple[int, ...]:
    """Group sizes that ONNX Runtime computes fast; 3 bits lie in a container of 4."""
    return GROUPS[4 if bits == 3 else bits]


def check_held(kind: str, target: str) -> None:
    """Refuse a type or mix that a target cannot hold.

    Args:
        kind: Known name, upper case.
        target: As `parse_targets` gives it.

    Raises:
        ValueError: It cannot; says what can.
    """
    shared = ", ".join(BOTH)
    if kind in (*FLOATS, *BOTH):
        return
    if is_onnx_type(kind) and "gguf" in target:
        same = GGUF_NAMES.get(kind)
        hint = f"{same} is what {kind} is called there" if same else f"both hold {shared}"
        raise ValueError(f"GGUF cannot hold {kind}; {hint}")
    if not is_onnx_type(kind) and "onnx" in target:
        what = "the mix" if kind in BASES and BASES[kind] != kind else "type"
        also = (
            "" if "gguf" in target else ", and INT4_G32, INT3_G64, UINT2_G64, FP4_G32 and the like"
        )
        raise ValueError(f"ONNX cannot hold {what} {kind}; it holds {shared}{also}")


def compose_type(
    target: str, bits: int | None, group_size: int | None, symmetric: bool | None
) -> str:
    """The type that bits, group size and symmetry mean.

    Args:
        target: As `parse_targets` gives it.
        bits: 2, 3, 4 or 8; None means 4.
        group_size: Inputs that share a scale; None means `DEFAULT_GROUPS`.
        symmetric: Whether levels lie around 0; None means yes.

    Raises:
        UsageError: There is no such type for the target.
    """
    bits = 4 if bits is None else bits
    if bits not in DEFAULT_GROUPS:
        raise UsageError(f"--bits {bits}", why="weights have 2, 3, 4 or 8 bits here")
    group = DEFAULT_GROUPS[bits] if group_size is None else group_size
    if symmetric is False and (bits == 8 or target != "onnx"):
        raise UsageError(
            f"--asymmetric with {bits} bits for {target}",
            why="there are integer zero points in ONNX, with 2, 3 and 4 bits",
            fix="leave it out; symmetric types may have negative scales",
        )
    if target != "onnx":
        if (bits, group) in SHARED:
            return SHARED[bits, group]
        known = ", ".join(f"{b} bits in groups of {g}" for b, g in SHARED)
        raise UsageError(
            f"--bits {bits} --group-size {group}: GGUF has no such type of plain integers",
            why=f"it has {known}",
            fix="name a type, such as --type Q3_K_M, or use --target onnx alone",
        )
    if group not in groups_of(bits):
        known = ", ".join(map(str, groups_of(bits)))
        raise UsageError(
            f"--group-size {group} at {bits} bits",
            why="ONNX Runtime has no fast kernel for such groups, or computes them wrongly",
            fix=f"use {known}",
        )
    return f"{'UINT' if symmetric is False else 'INT'}{bits}_G{group}"


def smaller_group(kind: str) -> str | None:
    """The same codes in groups of half the size; None if ONNX Runtime has none."""
    match = _TYPE.match(kind)
    if match is None:
        return None
    halved = f"{match[1]}{match[2]}_G{int(match[3]) // 2}"
    return halved if is_onnx_type(halved) else None
