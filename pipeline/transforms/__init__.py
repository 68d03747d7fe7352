"""Function-preserving rewrites of a model before it is quantized.

A recipe names a transform as ``KIND`` or ``KIND:option=value,option=value``. `TRANSFORMS` says what
kinds and options there are; the functions that `Kind.plan` names are imported only when the
transform runs. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.suggest import did_you_mean

Setting = str | int | float | bool
"""Value of an option."""


@dataclass(frozen=True)
class Option:
    """An option of a transform.

    Attributes:
        default: Its value when it is not given; decides its type.
        meaning: For people.
        choices: Allowed texts; for a list (``+`` between the items) the allowed items.
        least: Smallest allowed number.
        most: Largest allowed number.
    """

    default: Setting
    meaning: str
    choices: tuple[str, ...] = ()
    least: float = 0
    most: float = float("inf")


@dataclass(frozen=True)
class Kind:
    """A kind of transform.

    Attributes:
        plan: ``module:function`` that finds the changes, see `pipeline.stages.transform`.
        meaning: For people.
        options: By name.
        measures: Values of the option named first that need calibration statistics.
        online: Why it cannot be merged, for the targets that refuse it; else empty.
    """

    plan: str
    meaning: str
    options: Mapping[str, Option] = field(default_factory=dict)
    measures: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    online: str = ""


_SEED = Option(0, "Seed of random signs and matrices.", most=2**63 - 1)

TRANSFORMS: dict[str, Kind] = {
    "fold": Kind(
        "pipeline.transforms.folding:plan_fold",
        "Norm gains into the linears that follow; gains become one.",
    ),
    "rotate": Kind(
        "pipeline.transforms.rotation:plan_rotation",
        "Residual stream (R1) and values (R2) in rotated bases; folds norms first.",
        {
            "matrix": Option(
                "hadamard", "Kind of rotation.", ("hadamard", "orthogonal", "learned")
            ),
            "spaces": Option("residual+values", "What is rotated.", ("residual", "values")),
            "signs": Option(True, "Random signs before a Hadamard rotation."),
            "block": Option(0, "Channels of the residual stream rotated together; 0: all."),
            "seed": _SEED,
            "allow_untie": Option(False, "Store a tied head a second time, which R1 needs."),
            "objective": Option(
                "layers",
                "What is learned against: errors of linears, or the whole network's KL divergence.",
                ("layers", "network"),
            ),
            "steps": Option(100, "Steps of learning.", least=1),
            "rate": Option(0.2, "Length of the first step of learning.", least=1e-6, most=100.0),
            "blocks": Option(4, "Decoder blocks of objective layers, evenly spread.", least=1),
            "batch": Option(4, "Windows a step of objective network.", least=1),
            "momentum": Option(0.0, "Share of the last step, objective network.", most=0.999),
        },
        measures={"matrix": ("learned",)},
    ),
    "permute": Kind(
        "pipeline.transforms.permuting:plan_permutation",
        "Channels in another order: which weights share a scale, and which come first.",
        {
            "by": Option(
                "magnitude",
                "What decides: similar weights together, or one of MixQuant's orders.",
                ("magnitude", "alike", "mass", "massdiff", "zigzag", "random"),
            ),
            "spaces": Option(
                "inner+values",
                "What is reordered.",
                ("residual", "inner", "values", "heads"),
            ),
            "block": Option(32, "Channels of a block, for what thinks in blocks.", least=1),
            "seed": _SEED,
        },
        measures={"by": ("alike", "mass", "massdiff", "zigzag")},
    ),
    "equalize": Kind(
        "pipeline.transforms.equalization:plan_equalization",
        "Channels rescaled between the tensor that writes and those that read them.",
        {
            "method": Option("range", "How factors are found.", ("range", "smoothquant", "awq")),
            "spaces": Option(
                "attention_norm+ffn_norm+values+inner",
                "What is rescaled.",
                ("attention_norm", "ffn_norm", "final_norm", "values", "inner"),
            ),
            "alpha": Option(0.5, "Share of the range that moves.", most=1),
            "points": Option(20, "Points of AWQ's grid.", least=1, most=1000),
        },
        measures={"method": ("smoothquant", "awq")},
    ),
    "online": Kind(
        "pipeline.transforms.online:plan_online",
        "Hadamard rotation of each block of inputs of down_proj at run time (R4).",
        {"block": Option(32, "Channels that are rotated together.", least=1), "seed": _SEED},
        online="a block Hadamard rotation in front of down_proj is an operation of the graph, and "
        "llama.cpp's graphs of these families have none there",
    ),
}
"""Every kind of transform, by name."""


@dataclass(frozen=True)
class Transform:
    """One transform of a recipe.

    Attributes:
        kind: Its name in `TRANSFORMS`.
        options: The value of every option of the kind.
    """

    kind: str
    options: Mapping[str, Any]

    @property
    def spaces(self) -> tuple[str, ...]:
        """Kinds of the spaces that it changes, as its option says."""
        return tuple(str(self.options["spaces"]).split("+"))

    @property
    def unties(self) -> bool:
        """Whether it cannot be had with a head that is the embedding."""
        return self.kind == "rotate" and "residual" in self.spaces

    @property
    def measures(self) -> bool:
        """Whether it needs statistics of calibration inputs."""
        measured = TRANSFORMS[self.kind].measures
        return any(self.options[option] in values for option, values in measured.items())

    def __str__(self) -> str:
        """The text that a recipe holds; options at their defaults are left out."""
        known = TRANSFORMS[self.kind].options
        given = [f"{k}={_text(v)}" for k, v in self.options.items() if v != known[k].default]
        return f"{self.kind}:{','.join(given)}" if given else self.kind


def parse_transform(text: str) -> Transform:
    """The transform that a recipe's text names.

    Args:
        text: ``KIND`` or ``KIND:option=value,option=value``.

    Raises:
        ValueError: An unknown kind or option, or a value that the option does not take.
    """
    kind, _, rest = text.partition(":")
    if kind not in TRANSFORMS:
        raise ValueError(f"unknown transform {kind!r}; {did_you_mean(kind, TRANSFORMS)}")
    known = TRANSFORMS[kind].options
    values: dict[str, Setting] = {name: option.default for name, option in known.items()}
    for part in filter(None, rest.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in known:
            raise ValueError(f"{kind} has no option {name!r}; {did_you_mean(name, known)}")
        values[name] = _value(f"{kind}:{name}", value, known[name])
    return Transform(kind, values)


def _value(name: str, text: str, option: Option) -> Setting:
    if isinstance(option.default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"{name} is true or false, not {text!r}")
        return text == "true"
    if isinstance(option.default, str):
        items = text.split("+") if "+" in option.default or name.endswith(":spaces") else [text]
        for item in items:
            if item not in option.choices:
                raise ValueError(f"{name} knows no {item!r}; {did_you_mean(item, option.choices)}")
        return text
    try:
        number = type(option.default)(text)
    except ValueError:
        raise ValueError(f"{name} is a number, not {text!r}") from None
    if not option.least <= number <= option.most:
        raise ValueError(f"{name}={text} is outside {option.least:g} .. {option.most:g}")
    return number


def _text(value: Setting) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def default_text(option: Option) -> str:
    """An option's default as a recipe would write it."""
    return _text(option.default)


def table_text(table: Mapping[str, Any]) -> str:
    """The text of a ``[[transform]]`` table of a TOML recipe.

    Raises:
        ValueError: It has no kind.
    """
    options = dict(table)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError("a [[transform]] table needs a kind")
    given = ",".join(f"{name}={_text(value)}" for name, value in options.items())
    return f"{kind}:{given}" if given else kind
