"""Run times of the quantization core as ratios within one run.

CPU: group-interleaved PiSO against absmax inside GPTQ; the compiled channel-wise sweep against the
plain PyTorch event loop; growth with the width. GPU: seconds of the whole chain on one layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.kernels import piso_sweep
from pipeline.kernels.cpu import sweep as compiled
from pipeline.kernels.sweep import _ceiling, lattice_limits
from pipeline.kernels.twin import sweep as twin
from pipeline.quantization.formats import get_format
from pipeline.quantization.layer import LayerOptions, quantize_layer
from pipeline.quantization.objective import LayerObjective

REPEATS = 3


def problem(rows: int, width: int, device: str, seed: int = 0) -> tuple[Tensor, LayerObjective]:
    """Heavy-tailed weights and a Hessian of correlated inputs with unequal channels."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, width, generator=generator)
    W = (W * (1 + W.square() / 8)).to(device)
    rank = max(width // 8, 1)
    mix = torch.randn(rank, width, generator=generator) / rank**0.5
    spread = (torch.arange(1, width + 1) ** -0.4)[torch.randperm(width, generator=generator)]
    X = torch.randn(2 * width, width, generator=generator)
    X = X + 0.7 * torch.randn(2 * width, rank, generator=generator) @ mix
    X = (X * spread).to(device)
    return W, LayerObjective.from_moments(X.T @ X)


def fastest(call: Callable[[], object], device: str, repeats: int = REPEATS) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    call()
    best = float("inf")
    for _ in range(repeats):
        _wait(device)
        begun = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def interleaving(rows: int, width: int, device: str) -> None:
    """GPTQ with PiSO at every group's entry against GPTQ with absmax, 3 bits, groups of 128."""
    W, objective = problem(rows, width, device)
    fmt = get_format("INT3_G128")
    base = LayerOptions(scales="absmax", mismatch=0.0)
    times = {
        "absmax": fastest(lambda: quantize_layer(W, objective, fmt, base), device),
    }
    for name, signed in (("PiSO", False), ("PiSO, signed", True)):
        options = replace(base, scales="piso", signed=signed)
        times[name] = fastest(
            lambda options=options: quantize_layer(W, objective, fmt, options), device
        )
    print(f"GPTQ {rows}x{width}, INT3_G128, {device}: absmax {times['absmax']:.2f} s")
    for name, seconds in times.items():
        if name != "absmax":
            print(f"  {name}: {seconds:.2f} s, ratio {seconds / times['absmax']:.2f}")


def channel_wise(rows: int, width: int) -> None:
    """The compiled dense sweep over whole rows against the PyTorch event loop, 3 bits."""
    W, objective = problem(rows, width, "cpu")
    W, H = W.double(), objective.hessian
    b, levels = W @ H, get_format("INT3").grid
    ours = fastest(lambda: piso_sweep(W, H, b, levels, signed=False), "cpu")
    begun = time.perf_counter()
    loop = twin.piso_sweep(W, H, b, levels, False, True, 53, -1074, float("inf"))
    theirs = time.perf_counter() - begun
    same = bool(torch.equal(piso_sweep(W, H, b, levels, signed=False).level_indices, loop[1]))
    print(
        f"channel-wise sweep {rows}x{width}, 3 bits: compiled {ours:.2f} s, event loop "
        f"{theirs:.1f} s, ratio {theirs / ours:.0f}; same codes: {same}"
    )


def growth(rows: int, widths: tuple[int, ...]) -> None:
    """How the channel-wise sweep grows with the width; the bound is in^2 x out.

    Its work is one pass over a row of H for every transition that it walks.
    """
    previous = None
    for width in widths:
        W, objective = problem(rows, width, "cpu")
        W, H = W.double(), objective.hessian
        b, levels = W @ H, get_format("INT3").grid
        seconds = fastest(
            lambda W=W, H=H, b=b, levels=levels: piso_sweep(W, H, b, levels, signed=False), "cpu"
        )
        ceiling = _ceiling(H, b).numpy()
        arrays = (W.numpy(), H.numpy(), b.numpy(), levels.double().numpy())
        walked = compiled.piso_sweep(*arrays, False, True, *lattice_limits(None), ceiling)[3]
        work = int(walked.sum()) * width
        ratio = ""
        if previous is not None:
            ratio = f", {seconds / previous[0]:.2f} times the one before"
            ratio += f" for {work / previous[1]:.2f} times the updates of H q"
        rate = 8e-9 * work / seconds
        print(f"channel-wise sweep {rows}x{width}: {seconds:.3f} s, {rate:.1f} GB/s of H{ratio}")
        previous = seconds, work


def chain(rows: int, width: int, device: str, name: str) -> None:
    """One layer from moments to codes, step by step."""
    W, objective = problem(rows, width, device)
    fmt = get_format(name)
    solver = LayerOptions(mismatch=0.0)
    steps = {
        "absmax": replace(solver, scales="absmax"),
        "interleaved signed PiSO": solver,
        "+ refit and descent, 1 round": replace(solver, refine_rounds=1),
        "+ refit and descent, 4 rounds": replace(solver, refine_rounds=4),
    }
    print(f"{rows}x{width}, {name}, {device}:")
    for label, options in steps.items():
        loss = 0.0

        def call(options: LayerOptions = options) -> None:
            nonlocal loss
            loss = quantize_layer(W, objective, fmt, options).relative_loss

        seconds = fastest(call, device)
        print(f"  {label}: {seconds:.3f} s, relative loss {loss:.5f}")


def measure(device: str) -> None:
    """All figures for one device."""
    print(f"threads {torch.get_num_threads()}")
    if device == "cpu":
        interleaving(4096, 4096, "cpu")
        growth(256, (512, 1024, 2048))
        channel_wise(1024, 1024)
        return
    print(torch.cuda.get_device_name())
    interleaving(4096, 4096, device)
    chain(4096, 4096, device, "INT4_G32")
    chain(4096, 4096, device, "Q2_0")
    chain(4096, 14336, device, "INT4_G32")
