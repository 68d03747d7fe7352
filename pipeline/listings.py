"""What ``ls`` lists: name and description, by kind."""

from __future__ import annotations

from collections.abc import Callable


def types() -> dict[str, str]:
    """Types of decoder weights."""
    from pipeline.quantization.formats import get_format
    from pipeline.quantization.formats.integer import FLOAT_ZERO_BITS, MOST_ZERO_POINT_BITS
    from pipeline.recipe import TABLE_TYPES, WEIGHT_TYPES
    from pipeline.targets import DEFAULT_GROUPS, groups_of

    listed = {}
    for fmt in sorted(map(get_format, WEIGHT_TYPES), key=lambda fmt: fmt.bits_per_weight):
        offset = "scale and offset" if fmt.affine else "scale"
        text = f"{fmt.bits_per_weight:.4g} bits per weight, one {offset} for {fmt.group_size}"
        if fmt.codebook is not None:
            text += f", vectors of {fmt.codebook.places} from a codebook"
        listed[fmt.name] = text
    tables_only = "for the token embedding and the output head only"
    listed |= dict.fromkeys(TABLE_TYPES[len(WEIGHT_TYPES) :], tables_only)
    for bits in DEFAULT_GROUPS:
        groups = ", ".join(map(str, groups_of(bits)))
        container = " in a container of 4" if bits == 3 else ""
        listed[f"INT{bits}_G<group>"] = f"ONNX: {bits} bits{container}, one scale for {groups}"
        if bits <= MOST_ZERO_POINT_BITS:
            listed[f"UINT{bits}_G<group>"] = "ONNX: likewise, and an integer zero point"
    for bits in FLOAT_ZERO_BITS:
        text = "a float zero point; no standard operator, slow"
        groups = ", ".join(map(str, groups_of(bits)))
        listed[f"FINT{bits}_G<group>"] = f"ONNX: {bits} bits, one scale for {groups}, {text}"
    groups = ", ".join(map(str, groups_of(8)))
    listed["FP4_G<group>"] = f"ONNX: E2M1 by a table, one scale for {groups}"
    listed["FP8_G<group>"] = "ONNX: E4M3, likewise; expanded in every call, slow"
    return listed


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
    from importlib.metadata import version

    from runtimes import llamacpp

    found = f"installed ({llamacpp.version()})" if llamacpp.available() else "not installed"
    return {
        "torch": "full precision reference; always there",
        "emulator": "ggml's arithmetic in NumPy and PyTorch; always there",
        "llama.cpp": f"stock llama.cpp through llama-cpp-python; {found}",
        "onnxruntime": f"ONNX Runtime on the CPU; {version('onnxruntime')}",
    }


def transforms() -> dict[str, str]:
    """Transforms and their options, each with its default."""
    from pipeline.transforms import TRANSFORMS, default_text

    listed = {}
    for name, kind in TRANSFORMS.items():
        options = ", ".join(f"{k}={default_text(option)}" for k, option in kind.options.items())
        listed[name] = f"{kind.meaning} {options}".strip()
    return listed


LISTINGS: dict[str, Callable[[], dict[str, str]]] = {
    "types": types,
    "presets": presets,
    "architectures": architectures,
    "runtimes": runtimes,
    "transforms": transforms,
}
"""Every kind that ``ls`` knows."""
