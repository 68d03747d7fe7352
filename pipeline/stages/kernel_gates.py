"""The kernels' rung of the ladder: every matrix product of a runtime, on the runtime's own input.

Logits of whole runs cannot tell a wrong rounding from a right one, see `runtimes.trace`. Here the
input of each site is the runtime's, so that nothing but float32 noise is left between its output
and that of PyTorch with emulated rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.errors import VerificationError
from pipeline.recipe import Gates, Recipe
from pipeline.report import Gate
from pipeline.stages.limits import limit_gate
from runtimes.metrics import kl_divergence
from runtimes.torch_reference import DecoderBlock, TorchReference
from runtimes.trace import BLOCK_TENSORS, HEAD_TENSORS, Trace

LEVEL = "kernels"
CLAIM = "on the file, each matrix product is PyTorch's with its activation rounding"


@torch.inference_mode()
def kernel_gates(
    runtimes: Mapping[str, Trace], reference: TorchReference, tokens: Tensor, recipe: Recipe
) -> list[Gate]:
    """Compare runtimes with PyTorch, one site at a time; one block is in memory.

    Args:
        runtimes: Their ``trace`` methods by name.
        reference: The file's dequantized weights under the runtimes' activation rounding.
        tokens: The window to evaluate, int64 [context].
        recipe: Limits.

    Returns:
        For each runtime two gates: the worst relative difference of a traced tensor, and the mean
        KL divergence of its logits from those of the output matrix on its own final norm.

    Raises:
        VerificationError: A runtime shows other tensors than the reference has, or logits that are
            not finite.
    """
    embedded = reference.embed(tokens[None])
    checks = [_Check(name, trace, tokens, embedded) for name, trace in runtimes.items()]
    for index in range(reference.n_blocks):
        block = reference.block(index)
        norms = _norms_taken_out(block)
        for check in checks:
            check.block(index, block, norms)
    head = reference.head()
    for check in checks:
        check.head(reference, head)
    return [gate for check in checks for gate in check.gates(recipe.gates)]


def _norms_taken_out(block: DecoderBlock) -> tuple[nn.Module, nn.Module]:
    """The block's two norms; its sites then take what the runtime's norms gave them."""
    layer = block.layer
    norms = layer.input_layernorm, layer.post_attention_layernorm
    layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    return norms


class _Check:
    """Follows one runtime through the model.

    Args:
        runtime: Its name.
        trace: Its method.
        tokens: int64 [context].
        embedded: Residual stream at the first block, [1, context, hidden].
    """

    def __init__(self, runtime: str, trace: Trace, tokens: Tensor, embedded: Tensor) -> None:
        self._runtime = runtime
        self._stream = trace(tokens)
        self._residual = embedded
        self._differences: dict[str, float] = {}
        self._divergence = math.nan

    def block(self, index: int, block: DecoderBlock, norms: tuple[nn.Module, nn.Module]) -> None:
        """Compare the tensors of a block whose norms were taken out."""
        found = self._next(BLOCK_TENSORS, f"block {index}")
        before, between = self._residual, found["attention"]

        def compare(name: str, expected: Tensor, added_to: Tensor | None = None) -> None:
            self._compare(f"block {index}, {name}", found[name], expected, added_to)

        compare("qkv", norms[0](before))
        compare("o", block.heads(found["qkv"]))
        compare("attention", block.add_attention(before, found["o"]), before)
        compare("gate_up", norms[1](between))
        compare("down", block.site_input("down", found["gate_up"]))
        compare("mlp", between + block.layer.mlp.down_proj(found["down"]), between)
        self._residual = found["mlp"]

    def head(self, reference: TorchReference, head: nn.Module) -> None:
        """Compare the final norm and the logits."""
        found = self._next(HEAD_TENSORS, "head")
        self._compare("final norm", found["head"], reference.head_input(self._residual))
        logits = head(found["head"])
        self._compare("head", found["logits"], logits)
        self._divergence = kl_divergence(logits[0], found["logits"][0]).mean().item()
        if next(self._stream, None) is not None:
            raise self._other("more than a head", "the head")

    def gates(self, limits: Gates) -> list[Gate]:
        """Judge what was compared."""
        worst, limit = max(self._differences.values()), limits.kernels_rms
        beyond = [place for place, difference in self._differences.items() if difference >= limit]
        where = f"{len(beyond)} of {len(self._differences)} tensors; first: {''.join(beyond[:1])}"
        measure = "worst relative rms difference"
        kld = ("mean KLD of the head", self._divergence, limits.kernels_kld)
        return [
            limit_gate(LEVEL, CLAIM, self._runtime, measure, worst, limit, where),
            limit_gate(LEVEL, CLAIM, self._runtime, *kld),
        ]

    def _next(self, names: tuple[str, ...], place: str) -> dict[str, Tensor]:
        found = next(self._stream, {})
        if set(found) != set(names):
            raise self._other(", ".join(found) or "nothing", place)
        return {name: values[None] for name, values in found.items()}

    def _compare(
        self, place: str, found: Tensor, expected: Tensor, added_to: Tensor | None = None
    ) -> None:
        if found.shape != expected.shape:
            shapes = f"{list(found.shape[1:])} instead of {list(expected.shape[1:])}"
            raise self._other(shapes, place)
        self._differences[place] = relative_difference(found, expected, added_to)

    def _other(self, what: str, place: str) -> VerificationError:
        return VerificationError(
            f"{self._runtime} computed something else than the reference",
            why=f"it shows {what} in {place}",
            fix="the file's graph is not the checkpoint's: export it again",
        )


def relative_difference(found: Tensor, expected: Tensor, added_to: Tensor | None = None) -> float:
    """Root mean square of the difference over that of the expected values, mean over tokens.

    Taken by token because a few tokens are orders of magnitude larger than the others (massive
    activations: Sun et al. 2024, arXiv 2402.17762) and would hide them.

    Args:
        found: float32 [..., tokens, width].
        expected: The same shape.
        added_to: The residual stream that both were added to: the difference then counts relative
            to what was added.

    Returns:
        Infinite if a value is not finite, or if a token's expected values are all 0 and the found
        ones are not.
    """
    difference = (found - expected).norm(dim=-1)
    scale = (expected if added_to is None else expected - added_to).norm(dim=-1)
    relative = torch.where(difference == 0, 0.0, difference / scale).mean().item()
    return math.inf if math.isnan(relative) else relative
