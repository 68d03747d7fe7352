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
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from pipeline.mixes import BASES
from pipeline.suggest import did_you_mean
from pipeline.transforms import parse_transform

WEIGHT_TYPES = (
    *("Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0"),
)
"""Types that decoder weights can be stored in (the ggml formats that the solvers know)."""

TABLE_TYPES = (*WEIGHT_TYPES, "F16", "F32")
"""Types that the token embedding and the output head can be stored in."""

FILE_TYPES = tuple(dict.fromkeys((*WEIGHT_TYPES, *BASES)))
"""What a file can be made of: types, and llama-quantize's mixes of them."""

Value = str | int | float | bool | None | tuple[str, ...]
"""What a recipe key can hold."""


def _one_of(known: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value.upper() not in known:
            raise ValueError(f"unknown type; {did_you_mean(value, known)}")
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
    if kind.upper() not in TABLE_TYPES:
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
TableType = Annotated[str, _one_of(TABLE_TYPES)]
Transform = Annotated[str, AfterValidator(_transform)]
Name = Annotated[str, Field(min_length=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


class Calibration(_Frozen):
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
    held_out: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of the windows that solvers do not see; it decides how much refinement "
        "is kept.",
    )


class Quantization(_Frozen):
    """How scales and codes are chosen."""

    scales: Literal["absmax", "mse", "proxy", "piso", "lookahead"] = Field(
        default="piso",
        description="How scales are chosen: range, weight error, LDL diagonal of the Hessian, "
        "exact optimum, or exact optimum judged by the loss after rounding the group.",
    )
    hessian: Literal["dense", "diagonal", "identity"] = Field(
        default="dense", description="What piso keeps of the Hessian."
    )
    free_scales: bool = Field(
        default=False,
        description="Let piso fit a scale outside the range that rounds to its codes.",
    )
    rounding: Literal["nearest", "groupwise", "gptq", "gptaq", "qronos", "gpfq"] = Field(
        default="gptq",
        description="How codes are chosen; gptq spreads each error onto later columns.",
    )
    interleave: Literal["group", "layer"] = Field(
        default="group",
        description="When scales are chosen: as rounding enters each group, or before it starts.",
    )
    passes: int = Field(
        default=1,
        ge=0,
        description="Passes over the groups of groupwise rounding and layer scales.",
    )
    metric: Literal["schur", "block"] = Field(
        default="schur",
        description="Metric of a group's scale: the Hessian's Schur complement (columns still "
        "free) or its diagonal block.",
    )
    signed: bool = Field(
        default=True, description="Let scales be negative where the format stores a sign."
    )
    activation_order: bool = Field(
        default=True, description="Round the columns with the largest activations first."
    )
    orders: int = Field(
        default=1, ge=1, description="Orders of groups that are tried; every row keeps its best."
    )
    refine_rounds: int = Field(
        default=0,
        ge=0,
        description="Most rounds of refitting all scales of a row and descending on its codes.",
    )
    magr: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="MagR: penalty on the largest weight of each row before codes are chosen.",
    )
    bias_correction: bool = Field(
        default=False,
        description="Give linears the bias that makes the mean of their outputs right; the rest of "
        "the error is then minimized about its mean.",
    )
    damping: float = Field(
        default=0.01, ge=0, le=1, description="Added to H's diagonal, as a fraction of its mean."
    )
    shrinkage: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Ridge penalty on targets, in units of damping. Can lower perplexity on text "
        "unlike the training text; moves away from the full precision model.",
    )


class Evaluation(_Frozen):
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


class Gates(_Frozen):
    """Limits of the parity ladder; beyond one, the run fails."""

    twin: float = Field(
        default=1e-5,
        gt=0,
        description="abs(d ln ppl), runtime on the unquantized twin against PyTorch.",
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


class Runtime(_Frozen):
    """Which runtimes prove the file, and for how long they may run."""

    llamacpp: Literal["auto", "require", "off"] = Field(
        default="auto", description="Stock llama.cpp: when installed, always (else fail), or never."
    )
    time_limit_s: int = Field(
        default=1800, ge=1, description="Seconds that one runtime child may take."
    )


class Recipe(_Frozen):
    """Everything that decides what a run does."""

    model: Name | None = Field(
        default=None, description="Checkpoint folder or hub id; unset: the embedded demo model."
    )
    revision: Name | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    target: Literal["gguf"] = Field(default="gguf", description="File format to produce.")
    type: WeightType = Field(
        default="Q4_0", description="Type of the weights, or a mix of llama-quantize."
    )
    pure: bool = Field(default=False, description="All matrices in the one type, no mix.")
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
    evaluation: Evaluation = Evaluation()
    gates: Gates = Gates()
    runtime: Runtime = Runtime()

    @field_validator("revision")
    @classmethod
    def _needs_model(cls, revision: str | None, info: ValidationInfo) -> str | None:
        if revision is not None and info.data.get("model") is None:
            raise ValueError("only a hub model has revisions, and no model is given")
        return revision

    def flat(self) -> dict[str, Value]:
        """Every value under its dotted key (``calibration.samples``), in field order."""
        return {key: _lookup(self, key) for key in recipe_fields()}

    def decisive(self) -> dict[str, Value]:
        """The values that decide the bytes of the quantized weights, under their dotted keys.

        What only measures or judges the result (evaluation, gates, runtime) is left out, so that an
        interrupted run may continue with another gate.
        """
        measuring = ("evaluation.", "gates.", "runtime.")
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
        if isinstance(field.default, _Frozen):
            section = type(field.default).model_fields
            fields.update({f"{name}.{key}": leaf for key, leaf in section.items()})
        else:
            fields[name] = field
    return fields


def recipe_digest(recipe: Recipe) -> str:
    """SHA-256 of a recipe's values, hexadecimal; the same in every process and on every machine."""
    canonical = json.dumps(recipe.flat(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
