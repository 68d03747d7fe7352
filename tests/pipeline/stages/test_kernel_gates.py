"""The kernels' rung on the demo model: green as it is, red and told where with one thing wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.demo import MODEL, corpus
from pipeline.errors import VerificationError
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import quantize_free
from pipeline.recipe import Recipe
from pipeline.report import Gate
from pipeline.stages.export import export
from pipeline.stages.kernel_gates import kernel_gates, relative_difference
from pipeline.stages.load import EMBEDDING, HEAD, Source, open_source
from pipeline.stages.stored import StoredTensor
from runtimes import llamacpp
from runtimes.ggml_emulator import GGMLEmulator
from runtimes.gguf_weights import GGUFWeights, RoundedLinear
from runtimes.torch_reference import TorchReference
from runtimes.trace import Trace
from tests.tiny import trained_checkpoint

TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_0", "Q6_K", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "IQ4_XS"),
    *("IQ2_XS", "IQ3_S"),
)
NOISE = 1e-5
"""What a right runtime stays below: measured 4e-7 to 3e-6. A wrong rounding makes 4e-4 or more."""

RUNTIMES = ("ggml emulator", *(["llama.cpp"] if llamacpp.available() else []))
Wrap = Callable[[nn.Linear], nn.Module]


@dataclass(frozen=True)
class RoundToNearest:
    """As much of a `QuantizedModel` as the export needs."""

    source: Source

    def stored(self, name: str) -> StoredTensor:
        kind, weight = self.source.plan.types[name], self.source.read(name)
        return StoredTensor(kind, quantize_free(weight, get_format(kind), "absmax"))

    def read(self, name: str) -> Tensor:
        return self.source.read(name)


@dataclass(frozen=True)
class Case:
    """A file, what is in it, and a window of text."""

    path: Path
    source: Source
    weights: GGUFWeights
    tokens: Tensor

    def traces(self) -> dict[str, Trace]:
        traces: dict[str, Trace] = {"ggml emulator": GGMLEmulator(self.path).trace}
        if llamacpp.available():
            traces["llama.cpp"] = llamacpp.LlamaCpp(self.path).trace
        return traces

    def reference(
        self, read: Callable[[str], Tensor] | None = None, linears: Mapping[str, Wrap] | None = None
    ) -> TorchReference:
        rounded = {name: self.weights.linear(name) for name in self.source.plan.types}
        return TorchReference(
            self.source.config,
            read or self.weights.read,
            head=self.source.head,
            linears={**rounded, **(linears or {})},
        )

    def gates(self, **wrong: Any) -> dict[str, tuple[Gate, Gate]]:
        """Both gates of each runtime against a reference with something wrong in it."""
        found = kernel_gates(self.traces(), self.reference(**wrong), self.tokens, Recipe())
        assert [gate.runtime for gate in found[::2]] == list(RUNTIMES)
        return {a.runtime: (a, b) for a, b in zip(found[::2], found[1::2], strict=True)}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    folder = tmp_path_factory.mktemp("files")

    @cache
    def make(kind: str, model: Path = MODEL, head: str | None = None) -> Case:
        tables = {"token_embedding_type": "Q8_0", "output_tensor_type": head}
        recipe = Recipe(model=str(model), type=kind, pure=True, **tables)
        source = open_source(recipe, allow_pickle=False)
        path = folder / f"{model.name}-{kind}-{head}.gguf"
        export(path, RoundToNearest(source), recipe)  # type: ignore[arg-type]
        ids = source.tokenizer(corpus("evaluation", 4000), verbose=False).input_ids
        weights = GGUFWeights(path, source.checkpoint.config)
        return Case(path, source, weights, torch.tensor(ids[:200]))

    return make


def check_green(gates: Mapping[str, tuple[Gate, Gate]]) -> None:
    for rms, kld in gates.values():
        assert (rms.status, kld.status) == ("green", "green"), (rms, kld)
        assert rms.figure < NOISE
        assert kld.figure < 1e-9
        assert rms.detail == ""


@pytest.mark.parametrize("kind", TYPES)
def test_green_with_the_rounding_of_the_type(kind: str, case: Callable[..., Case]) -> None:
    check_green(case(kind).gates())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_green_on_other_families(family: str, case: Callable[..., Case]) -> None:
    check_green(case("Q4_1", trained_checkpoint(family)).gates())


@pytest.mark.parametrize(
    ("kind", "wrong", "least"),
    [
        ("Q8_0", "F32", 5e-3),
        ("Q8_0", "F16", 5e-3),
        ("Q8_0", "Q6_K", 1e-2),
        ("Q4_0", "F32", 5e-3),
        ("Q2_0", "Q6_K", 1e-2),
        ("Q6_K", "Q8_0", 1e-2),
        ("Q6_K", "F32", 1e-2),
        ("Q4_1", "F32", 5e-3),
        ("Q4_1", "Q8_0", 4e-4),  # offsets that see the codes' input instead of the stored sums
    ],
)
def test_red_with_the_rounding_of_another_type(
    kind: str, wrong: str, least: float, case: Callable[..., Case]
) -> None:
    other = dict.fromkeys(case(kind).source.plan.types, rounded_as(wrong))
    for rms, _ in case(kind).gates(linears=other).values():
        assert rms.status == "red"
        assert rms.figure > least


def rounded_as(kind: str) -> Wrap:
    return lambda linear: RoundedLinear(linear, kind, None)


def test_red_if_only_the_head_is_rounded_wrongly(case: Callable[..., Case]) -> None:
    for rms, kld in case("Q4_0").gates(linears={EMBEDDING: rounded_as("Q6_K")}).values():
        assert (rms.status, rms.detail) == ("red", "1 of 26 tensors; first: head")
        assert kld.status == "red"


def scaled(weight: Tensor) -> Tensor:
    return weight * 1.01


def one_row_lost(weight: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(weight[:1]), weight[1:]])


def one_column_lost(weight: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(weight[:, :1]), weight[:, 1:]], dim=1)


def heads_swapped(weight: Tensor) -> Tensor:
    return weight.roll(64, dims=0)


@pytest.mark.parametrize(
    ("name", "change", "place"),
    [
        (EMBEDDING, one_column_lost, "block 0, qkv"),
        ("model.layers.0.input_layernorm.weight", scaled, "block 0, qkv"),
        ("model.layers.1.self_attn.q_proj.weight", heads_swapped, "block 1, o"),
        ("model.layers.3.self_attn.k_proj.weight", one_row_lost, "block 3, o"),
        ("model.layers.0.self_attn.v_proj.weight", one_row_lost, "block 0, o"),
        ("model.layers.2.self_attn.o_proj.weight", one_row_lost, "block 2, attention"),
        ("model.layers.1.post_attention_layernorm.weight", scaled, "block 1, gate_up"),
        ("model.layers.1.mlp.gate_proj.weight", one_row_lost, "block 1, down"),
        ("model.layers.3.mlp.up_proj.weight", one_row_lost, "block 3, down"),
        ("model.layers.2.mlp.down_proj.weight", one_row_lost, "block 2, mlp"),
        ("model.norm.weight", scaled, "final norm"),
        (HEAD, one_row_lost, "head"),
    ],
)
def test_red_with_one_wrong_tensor_and_it_is_named(
    name: str, change: Callable[[Tensor], Tensor], place: str, case: Callable[..., Case]
) -> None:
    whole = case("Q4_0", head="Q5_0")  # a head of its own, although the model's is tied

    def read(wanted: str) -> Tensor:
        weight = whole.weights.read(wanted)
        return change(weight) if wanted == name else weight

    for rms, _ in whole.gates(read=read).values():
        assert rms.status == "red"
        assert rms.detail.endswith(f" of 26 tensors; first: {place}")


def altered(trace: Trace, change: Callable[[list[dict[str, Tensor]]], Any]) -> Trace:
    def changed(tokens: Tensor) -> Iterator[Mapping[str, Tensor]]:
        found = [{name: t.clone() for name, t in tensors.items()} for tensors in trace(tokens)]
        change(found)
        return iter(found)

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(2), "head, logits in block 3"),
        (lambda found: found.insert(1, found[0]), "qkv, o, .* in head"),
        (lambda found: found.pop(), "nothing in head"),
        (lambda found: found.append(found[-1]), "more than a head in the head"),
        (lambda found: found[1].pop("down"), "mlp in block 1"),
        (
            lambda found: found[1].update(down=found[1]["down"][:, :32]),
            r"\[200, 32\] instead of \[200, 768\] in block 1, down",
        ),
    ],
)
def test_a_runtime_with_another_graph_is_an_error(
    change: Callable[[list[dict[str, Tensor]]], Any], message: str, case: Callable[..., Case]
) -> None:
    whole = case("Q4_0")
    traces = {"other": altered(whole.traces()["ggml emulator"], change)}
    with pytest.raises(VerificationError, match=f"(?s)other computed something else.*{message}"):
        kernel_gates(traces, whole.reference(), whole.tokens, Recipe())


def test_values_that_are_not_finite_are_red(case: Callable[..., Case]) -> None:
    whole = case("Q4_0")

    def change(found: list[dict[str, Tensor]]) -> None:
        found[2]["o"][3, 5] = math.nan

    traces = {"other": altered(whole.traces()["ggml emulator"], change)}
    rms, _ = kernel_gates(traces, whole.reference(), whole.tokens, Recipe())
    assert (rms.status, rms.figure) == ("red", math.inf)
    assert rms.detail == "2 of 26 tensors; first: block 2, o"


def test_a_gate_has_the_recipe_s_limit(case: Callable[..., Case]) -> None:
    whole = case("Q4_0")
    recipe = Recipe.model_validate({"gates": {"kernels_rms": 1e-9, "kernels_kld": 1e-20}})
    traces = {"llama.cpp": whole.traces()[RUNTIMES[-1]]}
    rms, _ = kernel_gates(traces, whole.reference(), whole.tokens, recipe)
    assert rms.status == "red"
    assert rms.limit.endswith("< 1e-09")


def test_relative_difference_is_a_mean_over_tokens() -> None:
    expected = torch.tensor([[3.0, 4.0], [3e6, 4e6], [0.0, 0.0], [0.0, 5.0]])
    found = expected + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, 0.0], [0.3, 0.0]])
    assert relative_difference(found, expected) == pytest.approx((0.1 + 0 + 0 + 0.06) / 4)
    shift = torch.tensor([10.0, -7.0])
    assert relative_difference(found[::3] + shift, expected[::3] + shift, shift.expand(2, 2)) == (
        pytest.approx(0.08, rel=1e-5)
    )
    for wrong in (math.nan, math.inf, 1.0):
        broken = expected.clone()
        broken[2, 1] = wrong
        assert relative_difference(broken, expected) == math.inf
