"""Back-propagation through one block at a time: to linears, to parameters; sampled labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from runtimes.torch_reference import DecoderBlock, TorchReference


def inputs_and_gradients(
    block: DecoderBlock, linears: Sequence[str], residual: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Back-propagate through one block.

    Args:
        block: The block; its weights get no gradients.
        linears: Names of its linears.
        residual: Residual stream at its input, [windows, length, hidden].
        gradient: Of the loss, with respect to the stream at its output, same shape.

    Returns:
        The gradient with respect to `residual`, and for every linear its input [tokens, in] and the
        gradient with respect to its output [tokens, out].
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = (inputs[0].detach(), output)

        return hook

    hooks = [block.linear(name).register_forward_hook(watch(name)) for name in linears]
    try:
        with torch.enable_grad():
            start = residual.detach().clone().requires_grad_()
            end = block(start)
            outputs = [seen[name][1] for name in linears]
            first, *rest = torch.autograd.grad(end, [start, *outputs], gradient)
    finally:
        for handle in hooks:
            handle.remove()
    found = {
        name: (seen[name][0].flatten(0, 1), g.flatten(0, 1))
        for name, g in zip(linears, rest, strict=True)
    }
    return first, found


def parameters_and_gradients(
    block: DecoderBlock, wanted: Callable[[str], bool], residual: Tensor, gradient: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Back-propagate through one block to some of its parameters.

    Args:
        block: The block; none of its parameters asks for gradients afterwards.
        wanted: Of which parameters, by their names relative to the block.
        residual: Residual stream at its input, [windows, length, hidden].
        gradient: Of the loss, with respect to the stream at its output, same shape.

    Returns:
        The gradient with respect to `residual`, and those with respect to the parameters by name.
    """
    chosen = {name: one for name, one in block.layer.named_parameters() if wanted(name)}
    try:
        with torch.enable_grad():
            for one in chosen.values():
                one.requires_grad_()
            start = residual.detach().clone().requires_grad_()
            end = block(start)
            first, *rest = torch.autograd.grad(end, [start, *chosen.values()], gradient)
    finally:
        for one in chosen.values():
            one.requires_grad_(False)
    return first, dict(zip(chosen, rest, strict=True))


def sampled_gradient(
    model: TorchReference, head: Tensor, final: Tensor, generator: torch.Generator
) -> Tensor:
    """Gradient of the negative log-likelihood of sampled labels, at the end of the last block.

    Args:
        model: The float model.
        head: Its output matrix, [vocabulary, hidden].
        final: Residual stream after the last block, [windows, length, hidden].
        generator: Of the labels, one for every token; on the CPU, so that every device draws from
            the same numbers.
    """
    gradients = []
    for window in final:
        with torch.enable_grad():
            start = window.detach().clone().requires_grad_()
            normed = model.head_input(start)
        probabilities = torch.softmax(normed.detach() @ head.T, dim=-1)
        labels = torch.multinomial(probabilities.cpu(), 1, generator=generator)
        labels = labels.to(probabilities.device)
        probabilities.scatter_add_(1, labels, -torch.ones_like(probabilities[:, :1]))
        gradients.append(torch.autograd.grad(normed, start, probabilities @ head)[0])
    return torch.stack(gradients)
