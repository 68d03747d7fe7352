"""Our ONNX files against those of ONNX Runtime's own MatMulNBitsQuantizer, in one run.

The rivals quantize the decoder matrices of the same float graph, at the same bits and group size,
by round to nearest (symmetric and with zero points), HQQ and k-quant where they support the width;
embedding and head are the same tensors as in our file. Perplexity is measured with exact products,
tokens per second with ONNX Runtime's default ones (accuracy level 4). *Share* is our excess of
ln perplexity over full precision, relative to the best rival's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from exporters.onnx import WeightEntry, integer_weight, write_onnx
from exporters.onnx.entries import Content
from pipeline import run
from pipeline.progress import Progress, open_progress
from pipeline.quantization.formats import QuantizedTensor
from pipeline.recipe_files import load_recipe
from pipeline.stages.calibrate import prepare_texts
from pipeline.stages.evaluate import Logits, evaluate
from pipeline.stages.export_onnx import rotary_of
from pipeline.stages.load import Source, open_source
from pipeline.stages.walk import store_free
from pipeline.targets import compose_type
from runtimes.metrics import Comparison
from runtimes.onnxruntime import OnnxRuntime
from runtimes.onnxruntime_speed import measure as measure_speed
from runtimes.torch_reference import TorchReference

HEAD = "| type | file | MB | ln ratio | KLD | new tokens/s | share |"
FULL, OURS = "full precision", "ours"


def measure(
    model: str | None,
    calibration: str | None,
    evaluation: str | None,
    folder: Path,
    types: Sequence[str],
    preset: str,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Deploy each type, let ONNX Runtime quantize the same model, compare, print a row a file.

    Args:
        model: Checkpoint; None for the demo model.
        calibration: Text for us; the rivals use none.
        evaluation: Text that all files are judged on.
        folder: Where the files are kept; a deploy that is there already is taken.
        types: ``BITS`` or ``BITSxGROUP``.
        preset: Of the recipe.
        settings: Further recipe values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    print(HEAD + "\n" + "| --- " * 7 + "|", flush=True)
    for text in types:
        bits, _, group = text.partition("x")
        kind = compose_type("onnx", int(bits), int(group) if group else None, True)
        given = {
            "model": model,
            "target": "onnx",
            "type": kind,
            "calibration.source": calibration,
            "evaluation.source": evaluation,
            **settings,
        }
        with open_progress() as progress:
            _one(kind, preset, given, folder, progress)


def _one(kind: str, preset: str, options: dict[str, Any], folder: Path, progress: Progress) -> None:
    resolved = load_recipe(preset, options=options)
    ours = folder / f"{preset}-{kind}"
    if not ours.is_dir():
        run.deploy(resolved, output=ours, progress=progress)
    source = open_source(resolved.recipe, allow_pickle=False)
    texts = prepare_texts(resolved.recipe, source)
    floating = folder / f"float-{kind}"
    floating.mkdir(exist_ok=True)
    _write_float(floating, source)
    files = {OURS: ours / "model.onnx", **_rivals(floating / "model.onnx", kind, folder, progress)}
    protocol, tokens = next(iter(texts.evaluation.items()))
    models: dict[str, Logits] = {
        FULL: TorchReference(source.config, source.read, head=source.head).logits,
        **{name: OnnxRuntime(path).logits for name, path in files.items()},
    }
    found = evaluate(models, [(FULL, name) for name in files], tokens, protocol, progress)
    excess = {name: found[FULL, name].delta_nll for name in files}
    best = min((n for n in files if n != OURS), key=excess.__getitem__)
    fast = {n: path if n == OURS else _at_level_4(path) for n, path in files.items()}
    speeds: dict[str, list[float]] = {name: [] for name in fast}
    for _ in range(3):  # in turn, so that what else runs on the machine hits all
        for name, path in fast.items():
            speeds[name].append(measure_speed(path, prompt=32, new=64).new_tokens_per_second)
    for name, path in files.items():
        share = f"{excess[OURS] / excess[best]:.2f}" if name == OURS else ""
        speed = f"{max(speeds[name]):.0f}"
        print(_row(kind, name, path, found[FULL, name], speed, share), flush=True)


def _row(kind: str, name: str, path: Path, found: Comparison, speed: str, share: str) -> str:
    size = sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")) / 1e6
    return (
        f"| {kind} | {name} | {size:.2f} | {found.delta_nll:+.4f} ± {found.delta_stderr:.4f} "
        f"| {found.kld_mean:.4f} | {speed} | {share} |"
    )


def _write_float(folder: Path, source: Source) -> None:
    """The decoder with float matrices; embedding and head as in our file."""

    def entry(name: str, shape: tuple[int, ...]) -> WeightEntry:
        kind = "F32" if ".layers." in name else source.plan.types.get(name, "F32")

        def read() -> Content:
            stored = store_free(kind, source.read(name))
            if isinstance(stored.content, QuantizedTensor):
                return integer_weight(stored.content, name)
            return stored.content.numpy()

        return WeightEntry(name, kind, shape, read)

    write_onnx(
        folder,
        config=source.checkpoint.config,
        entries=[entry(name, shape) for name, shape in source.shapes.items()],
        rotary=rotary_of(source),
    )


def _rivals(floating: Path, kind: str, folder: Path, progress: Progress) -> dict[str, Path]:
    """Files of ONNX Runtime's quantizer by the name of its method."""
    bits, group = int(kind[3]), int(kind.partition("_G")[2])
    kquant: dict[str, Any] = {"bits": bits, "group_size": group}
    makers: dict[str, Callable[[onnx.ModelProto], MatMulNBitsQuantizer]] = {
        "RTN symmetric": lambda proto: _default(proto, bits, group, symmetric=True),
        "RTN": lambda proto: _default(proto, bits, group, symmetric=False),
        "HQQ": lambda proto: MatMulNBitsQuantizer(
            proto, algo_config=HQQWeightOnlyQuantConfig(block_size=group, bits=bits)
        ),
        "k-quant": lambda proto: MatMulNBitsQuantizer(
            proto,
            bits=bits,
            block_size=group,
            algo_config=KQuantWeightOnlyQuantConfig(
                customized_weight_config={
                    node.name: kquant for node in proto.graph.node if node.op_type == "MatMul"
                }
            ),
        ),
    }
    made = {}
    for name, make in makers.items():
        path = folder / f"rival-{kind}-{name.replace(' ', '-')}" / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        try:
            quantizer = make(onnx.load(str(floating)))
            quantizer.process()
        except Exception as error:  # it refuses widths in many ways
            progress.note(f"ONNX Runtime's {name} at {kind}: {type(error).__name__}: {error}")
            continue
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        quantizer.model.save_model_to_file(str(path), use_external_data_format=True)
        nodes = list(onnx.load(str(path), load_external_data=False).graph.node)
        fused = sum(node.op_type == "MatMulNBits" for node in nodes)
        widths = {a.i for n in nodes for a in n.attribute if a.name == "bits"}
        if not fused or widths != {bits}:
            progress.note(f"ONNX Runtime's {name} at {kind}: {fused} quantized, bits {widths}")
            continue
        made[name] = path
    return made


def _default(
    proto: onnx.ModelProto, bits: int, group: int, *, symmetric: bool
) -> MatMulNBitsQuantizer:
    config = DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=symmetric, bits=bits)
    return MatMulNBitsQuantizer(proto, algo_config=config)


def _at_level_4(path: Path) -> Path:
    """The same file with products as ONNX Runtime computes ours by default."""
    proto = onnx.load(str(path), load_external_data=False)
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [a for a in node.attribute if a.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", 4)])
    other = path.with_name("level-4.onnx")
    onnx.save(proto, str(other))
    return other
