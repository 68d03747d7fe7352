"""The frozen, validated description of a run.

A recipe holds every value that decides what a run does; where a value came from is kept beside it
(`ResolvedRecipe.origins`), layered as defaults < preset < file < ``--set`` < command-line options.
This module imports neither torch nor any other part of the pipeline that needs it.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from pipeline.mixes import BASES
from pipeline.recipe_quantization import Frozen, Onnx, Quantization
from pipeline.sizes import parse_size, size_label
from pipeline.suggest import did_you_mean
from pipeline.targets import check_held, is_onnx_type, parse_targets
from pipeline.transforms import parse_transform

WEIGHT_TYPES = (
    *("Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)
"""Types that decoder weights can be stored in (the ggml formats that the solvers know)."""

TABLE_TYPES = (*WEIGHT_TYPES, "F16", "F32")
"""Types that the token embedding and the output head can be stored in."""

FILE_TYPES = tuple(dict.fromkeys((*WEIGHT_TYPES, *BASES)))
"""What a file can be made of: types, and llama-quantize's mixes of them."""

DEFAULT_TYPE = "Q4_0"
"""Type of the weights where neither a type nor a budget is given."""

BUDGETS = ("target_size", "target_bpw")
"""Keys that give a budget instead of a type."""

Value = str | int | float | bool | None | tuple[str, ...]
"""What a recipe key can hold."""


def _one_of(known: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value.upper() not in known and not is_onnx_type(value.upper()):
            raise ValueError(f"unknown type; {did_you_mean(value, known)}; INT4_G32 ... for ONNX")
        return value.upper()

    return AfterValidator(check)


def _transform(text: str) -> str:
    return str(parse_transform(text))


def split_tensor_type(text: str) -> tuple[str, str]:
    """Pattern and type of ``REGEX=TYPE``.

    Raises:
        ValueError: Another form, a wrong expression, or an unknown type.
    """
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"{text!r} is not REGEX=TYPE")
    if kind.upper() not in TABLE_TYPES and not is_onnx_type(kind.upper()):
        raise ValueError(f"unknown type {kind!r}; {did_you_mean(kind, TABLE_TYPES)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern, kind.upper()


def _tensor_type(text: str) -> str:
    return "=".join(split_tensor_type(text))


WeightType = Annotated[str, _one_of(FILE_TYPES)]
TensorType = Annotated[str, AfterValidator(_tensor_type)]
Size = Annotated[
    int, Field(ge=1), BeforeValidator(lambda v: parse_size(v) if isinstance(v, str) else v)
]
TableType = Annotated[str, _one_of(TABLE_TYPES)]
Target = Annotated[str, AfterValidator(parse_targets)]
Transform = Annotated[str, AfterValidator(_transform)]
Name = Annotated[str, Field(min_length=1)]


class Calibration(Frozen):
    """The text that the second moments H and G are measured on."""

    source: Name | None = Field(
        default=None,
        description="Text file or hub data set; unset: the standard library for the demo model, "
        "else wikitext2.",
    )
    samples: int = Field(default=128, ge=1, description="Windows of text.")
    seqlen: int = Field(default=512, ge=2, description="Tokens per window.")
    batch: int = Field(
        default=8, ge=1, description="Windows per forward pass: memory against speed."
    )
    mismatch: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="How far targets correct the error of the blocks before: "
        "0 symmetric GPTQ, 1 Qronos.",
    )
    mismatch_estimate: Literal[
        "fixed", "split-halves", "shrinkage", "reachable", "closed-form", "sampled"
    ] = Field(
        default="fixed",
        description="What multiplies mismatch: nothing, or CoreQ's coefficient, estimated for each "
        "linear.",
    )
    stream_correction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="How far linears that feed the residual stream also make good what the stream "
        "lost before them.",
    )
    gradient_weighting: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="How much more tokens count whose outputs the loss depends on: exponent of "
        "their squared gradient; 0 all alike, 1 GuidedQuant.",
    )
    held_out: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of the windows that solvers do not see; it decides how much refinement "
        "is kept.",
    )


class Tuning(Frozen):
    """Gains of norms, fitted to the float model's predictions after quantization."""

    steps: int = Field(default=0, ge=0, description="Steps of the optimizer; 0 leaves them.")
    batch: int = Field(default=4, ge=1, description="Windows of calibration.seqlen in a step.")
    rate: float = Field(default=3e-3, gt=0, le=1, description="Largest step of a gain, relative.")


class Evaluation(Frozen):
    """The text and the protocols that quality and parity are measured with."""

    source: Name | None = Field(
        default=None, description="Text file or hub data set; unset: what calibration holds out."
    )
    context: int = Field(
        default=512, ge=4, description="Tokens per chunk, llama-perplexity's protocol."
    )
    chunks: int = Field(default=40, ge=1, description="Chunks scored, llama-perplexity's protocol.")
    gptq_context: int = Field(
        default=2048, ge=2, description="Tokens per window, GPTQ papers' protocol."
    )


class Gates(Frozen):
    """Limits of the parity ladder; beyond one, the run fails."""

    twin: float = Field(
        default=1e-5,
        gt=0,
        description="abs(d ln ppl), runtime on the unquantized twin against PyTorch.",
    )
    logits: float = Field(
        default=1e-3,
        gt=0,
        description="Largest difference of a logit, ONNX Runtime's exact mode against PyTorch.",
    )
    kernels_rms: float = Field(
        default=1e-4,
        gt=0,
        description="Relative rms difference, each of a runtime's matrix products against PyTorch "
        "with its activation rounding.",
    )
    kernels_kld: float = Field(
        default=5e-5, gt=0, description="Mean KLD, likewise, the output head alone."
    )
    deployed_lnppl: float = Field(
        default=2e-3,
        gt=0,
        description="abs(d ln ppl), runtime on the file against PyTorch; 2.5 times as much with "
        "K-quants, which round their inputs more coarsely.",
    )
    deployed_kld: float = Field(
        default=1e-3,
        gt=0,
        description="Mean KLD, runtime on the file against PyTorch; 5 times as much with K-quants.",
    )
    max_ln_ppl_increase: float | None = Field(
        default=None,
        gt=0,
        description="Quality lost to quantization, ln(ppl / ppl); unset: report only.",
    )


class Runtime(Frozen):
    """Which runtimes prove the file, and for how long they may run."""

    llamacpp: Literal["auto", "require", "off"] = Field(
        default="auto", description="Stock llama.cpp: when installed, always (else fail), or never."
    )
    time_limit_s: int = Field(
        default=1800, ge=1, description="Seconds that one runtime child may take."
    )


class Recipe(Frozen):
    """Everything that decides what a run does."""

    model: Name | None = Field(
        default=None, description="Checkpoint folder or hub id; unset: the embedded demo model."
    )
    revision: Name | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    target: Target = Field(
        default="gguf", description="File formats to produce: gguf, onnx, or both (gguf,onnx)."
    )
    type: WeightType | None = Field(
        default=None,
        description=f"Type of the weights, or a mix of llama-quantize (GGUF); unset: "
        f"{DEFAULT_TYPE}, or what a budget buys.",
    )
    pure: bool = Field(default=False, description="All matrices in the one type, no mix.")
    target_size: Size | None = Field(
        default=None,
        description="Most bytes that the file may have; each matrix gets the type that serves "
        "best. Also 15MB or 14.5MiB.",
    )
    target_bpw: float | None = Field(
        default=None,
        gt=0,
        description="The same as bits of the file for each parameter of the model.",
    )
    token_embedding_type: TableType | None = Field(
        default=None, description="Type of the token embedding; unset: as the mix has it."
    )
    output_tensor_type: TableType | None = Field(
        default=None, description="Type of the output head; unset: as the mix has it."
    )
    tensor_types: tuple[TensorType, ...] = Field(
        default=(),
        strict=False,
        description="REGEX=TYPE by GGUF name; the first that fits decides.",
    )
    allow_fallback: bool = Field(
        default=False,
        description="Replace a type where a width does not divide, instead of failing.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where layers are solved; auto: a GPU if PyTorch sees one."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of every random choice.")
    transforms: tuple[Transform, ...] = Field(
        default=(),
        strict=False,
        description="Function-preserving rewrites, in order: KIND:option=value,option=value.",
    )
    imatrix: Name | None = Field(
        default=None,
        description="Importance matrix of llama-imatrix (GGUF) in place of calibration: the "
        "diagonal of H, nothing else.",
    )
    emit: tuple[Literal["imatrix", "kld-base"], ...] = Field(
        default=(),
        strict=False,
        description="Also write: importance matrix for llama-quantize, reference logits for "
        "llama-perplexity.",
    )
    calibration: Calibration = Calibration()
    quantization: Quantization = Quantization()
    tuning: Tuning = Tuning()
    evaluation: Evaluation = Evaluation()
    onnx: Onnx = Onnx()
    gates: Gates = Gates()
    runtime: Runtime = Runtime()

    @field_validator("revision")
    @classmethod
    def _needs_model(cls, revision: str | None, info: ValidationInfo) -> str | None:
        if revision is not None and info.data.get("model") is None:
            raise ValueError("only a hub model has revisions, and no model is given")
        return revision

    @field_validator(*BUDGETS)
    @classmethod
    def _replaces_a_type(
        cls, budget: int | float | None, info: ValidationInfo
    ) -> int | float | None:
        if budget is not None and "onnx" in info.data.get("target", ""):
            raise ValueError("a budget chooses among types of GGUF; give --type or --bits for ONNX")
        given = [key for key in ("type", *BUDGETS) if info.data.get(key) is not None]
        given += ["pure"] if info.data.get("pure") else []
        if budget is not None and given:
            raise ValueError(
                f"{given[0]} is given too, and a budget chooses the types itself "
                "(token_embedding_type, output_tensor_type and tensor_types pin single ones)"
            )
        return budget

    @field_validator("imatrix")
    @classmethod
    def _needs_no_gradients(cls, imatrix: str | None, info: ValidationInfo) -> str | None:
        if imatrix is not None and any(info.data.get(key) is not None for key in BUDGETS):
            raise ValueError("a budget is spent by what calibration text tells, not a diagonal")
        return imatrix

    @property
    def weight_type(self) -> str:
        """The type or mix asked for, by default `DEFAULT_TYPE`; what a budget starts from."""
        return self.type or DEFAULT_TYPE

    @property
    def budgeted(self) -> bool:
        """Whether types are chosen under a budget."""
        return self.target_size is not None or self.target_bpw is not None

    @property
    def label(self) -> str:
        """The type or the budget, for names of files and people."""
        if self.target_size is not None:
            return size_label(self.target_size)
        return self.weight_type if self.target_bpw is None else f"{self.target_bpw:g}bpw"

    @field_validator("type", "token_embedding_type", "output_tensor_type", "tensor_types")
    @classmethod
    def _held_by_target(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = (
            (text.rpartition("=")[2] for text in value)
            if info.field_name == "tensor_types"
            else [value]
        )
        for kind in kinds:
            if kind is not None and "target" in info.data:
                check_held(kind, info.data["target"])
        return value

    @property
    def targets(self) -> tuple[str, ...]:
        """File formats to produce, the main one first."""
        return tuple(self.target.split(","))

    def flat(self) -> dict[str, Value]:
        """Every value under its dotted key (``calibration.samples``), in field order."""
        return {key: _lookup(self, key) for key in recipe_fields()}

    def decisive(self) -> dict[str, Value]:
        """The values that decide the bytes of the quantized weights, under their dotted keys.

        What only measures or judges the result (evaluation, gates, runtime), writes it (onnx) or
        comes after it (tuning) is left out, so that an interrupted run may continue with another
        gate.
        """
        measuring = ("evaluation.", "gates.", "runtime.", "onnx.", "tuning.")
        return {key: value for key, value in self.flat().items() if not key.startswith(measuring)}


def _lookup(recipe: Recipe, key: str) -> Value:
    holder: object = recipe
    for part in key.split("."):
        holder = getattr(holder, part)
    return holder  # type: ignore[return-value]


@cache
def recipe_fields() -> dict[str, FieldInfo]:
    """Every key of a recipe, dotted, with its default and description; top-level keys first."""
    fields: dict[str, FieldInfo] = {}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, Frozen):
            section = type(field.default).model_fields
            fields.update({f"{name}.{key}": leaf for key, leaf in section.items()})
        else:
            fields[name] = field
    return fields


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of a recipe's values, hexadecimal; the same in every process and on every machine."""
    canonical = json.dumps(recipe.flat(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
