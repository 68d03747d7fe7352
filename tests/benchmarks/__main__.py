"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.benchmarks import block_rotations, transforms


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fast = commands.add_parser("speed", help="ratios of run times, CPU or GPU")
    fast.add_argument("--device", default="cpu")
    good = commands.add_parser("quality", help="layer loss and perplexity of all methods")
    good.add_argument("model", nargs="?", help="checkpoint folder (default: the demo model)")
    good.add_argument("--calibration")
    good.add_argument("--evaluation")
    good.add_argument("--samples", type=int, default=128)
    good.add_argument("--seqlen", type=int, default=512)
    good.add_argument("--device", default="auto")
    good.add_argument("--batch", type=int, default=8)
    good.add_argument("--out", type=Path, default=Path("quality.json"))
    good.add_argument("--only", default="", help="part of 'FORMAT | METHOD SCALES'")
    good.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    rival = commands.add_parser("stock", help="our files against llama-quantize's")
    rival.add_argument("model", nargs="?", help="checkpoint folder (default: the demo model)")
    rival.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M"])
    rival.add_argument("--preset", default="balanced")
    rival.add_argument("--pure", action="store_true", help="one type; embedding and head Q8_0")
    rival.add_argument("--calibration")
    rival.add_argument("--evaluation")
    rival.add_argument("--folder", type=Path, default=Path("stock"), help="where files are kept")
    _add_set(rival)
    other = commands.add_parser("onnx", help="our ONNX files against ONNX Runtime's quantizer's")
    other.add_argument("model", nargs="?", help="checkpoint folder (default: the demo model)")
    other.add_argument("--types", nargs="+", default=["4x32", "2x64"], help="BITS or BITSxGROUP")
    other.add_argument("--preset", default="balanced")
    other.add_argument("--calibration")
    other.add_argument("--evaluation")
    other.add_argument("--folder", type=Path, default=Path("onnx"), help="where files are kept")
    _add_set(other)
    spent = commands.add_parser("budget", help="what a budget buys at the sizes of mixes")
    spent.add_argument("model", nargs="?", help="checkpoint folder (default: the demo model)")
    spent.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K_M", "Q4_K_M"])
    spent.add_argument("--preset", default="balanced")
    spent.add_argument("--calibration")
    spent.add_argument("--evaluation")
    spent.add_argument("--folder", type=Path, default=Path("budget.piso-run"))
    show = commands.add_parser("table", help="print the figures of a quality run as a table")
    show.add_argument("file", type=Path)
    join = commands.add_parser("transforms-table", help="one table of several transforms runs")
    join.add_argument("files", nargs="+", type=Path)
    _add_transforms(commands)
    wanted = parser.parse_args()
    if wanted.command == "speed":
        _module("speed").measure(wanted.device)
    elif wanted.command == "stock":
        _module("stock").measure(
            wanted.model,
            wanted.calibration,
            wanted.evaluation,
            wanted.folder,
            wanted.types,
            wanted.preset,
            pure=wanted.pure,
            settings=_settings(wanted),
        )
    elif wanted.command == "onnx":
        _module("onnx").measure(
            wanted.model,
            wanted.calibration,
            wanted.evaluation,
            wanted.folder,
            wanted.types,
            wanted.preset,
            settings=_settings(wanted),
        )
    elif wanted.command == "budget":
        _module("budget").measure(
            wanted.model,
            wanted.calibration,
            wanted.evaluation,
            wanted.folder,
            wanted.types,
            wanted.preset,
        )
    elif wanted.command == "transforms":
        _measure_transforms(wanted)
    elif wanted.command == "transforms-table":
        print(transforms.merged(wanted.files))
    elif wanted.command == "table":
        print(_module("table").render(wanted.file))
    else:
        _module("quality").measure(
            wanted.model,
            wanted.calibration,
            wanted.evaluation,
            wanted.out,
            samples=wanted.samples,
            seqlen=wanted.seqlen,
            device=wanted.device,
            batch=wanted.batch,
            only=wanted.only,
            seconds=wanted.seconds,
        )
        print(_module("table").render(wanted.out))


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="further recipe values"
    )


def _settings(wanted: argparse.Namespace) -> dict[str, Any]:
    return dict(_setting(text) for text in wanted.set)


def _setting(text: str) -> tuple[str, Any]:
    """Key and value; numbers and true are JSON, anything else is a text."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _module(name: str) -> Any:
    """A benchmark; each needs packages that the others do not."""
    return import_module(f"tests.benchmarks.{name}")


def _add_transforms(commands: Any) -> None:
    rewritten = commands.add_parser("transforms", help="perplexity by transform and type")
    rewritten.add_argument("model", help="checkpoint folder")
    rewritten.add_argument("--calibration")
    rewritten.add_argument("--evaluation")
    rewritten.add_argument("--samples", type=int, default=128)
    rewritten.add_argument("--chunks", type=int, default=40)
    rewritten.add_argument("--device", default="auto")
    rewritten.add_argument("--preset", default="balanced")
    rewritten.add_argument("--types", nargs="+", default=list(transforms.TYPES))
    rewritten.add_argument(
        "--only", "--rows", dest="rows", nargs="+", default=list(transforms.ROWS), metavar="ROW"
    )
    _add_set(rewritten)
    rewritten.add_argument("--outliers", nargs="+", default=["without", "with"])
    rewritten.add_argument("--out", type=Path, default=Path("transforms.json"))
    rewritten.add_argument(
        "--blocks", nargs="+", type=int, default=list(block_rotations.BLOCKS), help="0: all"
    )
    rewritten.add_argument(
        "--activations", action="store_true", help="4-bit activations and block rotations instead"
    )


def _measure_transforms(wanted: argparse.Namespace) -> None:
    place = (wanted.model, wanted.calibration, wanted.evaluation, wanted.out)
    shared = {
        "samples": wanted.samples,
        "chunks": wanted.chunks,
        "device": wanted.device,
        "outliers": wanted.outliers,
    }
    if wanted.activations:
        block_rotations.measure(*place, **shared, blocks=wanted.blocks)
        return
    unknown = set(wanted.rows) - set(transforms.ROWS)
    if unknown:
        raise SystemExit(f"no such row: {sorted(unknown)}; there are {list(transforms.ROWS)}")
    transforms.measure(
        *place,
        **shared,
        preset=wanted.preset,
        types=wanted.types,
        rows=wanted.rows,
        settings=_settings(wanted),
    )


if __name__ == "__main__":
    main()
