"""Sections of a recipe: how matrices are quantized, and the graph of ONNX files."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """Values that are checked once, strictly, and never change."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


class Quantization(Frozen):
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


class Onnx(Frozen):
    """The graph of ONNX files."""

    attention: Literal["standard", "primitive", "gqa"] = Field(
        default="standard",
        description="Operators: of the ONNX standard, of opset 21 only, or ONNX Runtime's "
        "GroupQueryAttention.",
    )
    packed: bool = Field(default=False, description="Store 3 bits in 3; slower to load only.")
