"""What ``ls`` lists: name and description, by kind."""

from __future__ import annotations

from collections.abc import Callable


def types() -> dict[str, str]:
    """Types of decoder weights."""
    from pipeline.quantization.formats import get_format
    from pipeline.recipe import TABLE_TYPES, WEIGHT_TYPES

    listed = {}
    for fmt in sorted(map(get_format, WEIGHT_TYPES), key=lambda fmt: fmt.bits_per_weight):
        offset = "scale and offset" if fmt.affine else "scale"
        text = f"{fmt.bits_per_weight:.4g} bits per weight, one {offset} for {fmt.group_size}"
        if fmt.codebook is not None:
            text += f", vectors of {fmt.codebook.places} from a codebook"
        listed[fmt.name] = text
    tables_only = "for the token embedding and the output head only"
    return listed | dict.fromkeys(TABLE_TYPES[len(WEIGHT_TYPES) :], tables_only)


def presets() -> dict[str, str]:
    """Presets, with the comment that opens each file."""
    from pipeline.recipe_files import preset_names, preset_text

    return {name: preset_text(name).partition("\n")[0].lstrip("# ") for name in preset_names()}


def architectures() -> dict[str, str]:
    """Model families."""
    from pipeline.architectures import ARCHITECTURES

    return {
        name: f"{family.class_prefix}ForCausalLM; rope: {', '.join(sorted(family.rope_types))}"
        for name, family in ARCHITECTURES.items()
    }


def runtimes() -> dict[str, str]:
    """Runtimes that a file can be proved in."""
    from runtimes import llamacpp

    found = f"installed ({llamacpp.version()})" if llamacpp.available() else "not installed"
    return {
        "torch": "full precision reference; always there",
        "emulator": "ggml's arithmetic in NumPy and PyTorch; always there",
        "llama.cpp": f"stock llama.cpp through llama-cpp-python; {found}",
    }


LISTINGS: dict[str, Callable[[], dict[str, str]]] = {
    "types": types,
    "presets": presets,
    "architectures": architectures,
    "runtimes": runtimes,
}
"""Every kind that ``ls`` knows."""
