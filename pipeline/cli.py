"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli_errors import session
from pipeline.cli_help import MAIN, PROGRAM, TaughtCommand, TaughtGroup
from pipeline.cli_options import (
    AllowPickle,
    Attention,
    Debug,
    DryRun,
    Evaluation,
    Fresh,
    OriginalModel,
    Output,
    Overwrite,
    ProgressMode,
    RecipeChoice,
    RunDir,
    takes_recipe,
)
from pipeline.errors import UsageError
from pipeline.suggest import did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.progress import Progress
    from pipeline.recipe import Recipe
    from pipeline.report import Report

app = typer.Typer(
    cls=TaughtGroup,
    help=MAIN,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends the process with one of the documented exit codes."""
    app(args=None if arguments is None else list(arguments), prog_name=PROGRAM)


@app.command(cls=TaughtCommand)
@takes_recipe
def deploy(
    choice: RecipeChoice,
    *,
    output: Output = None,
    overwrite: Overwrite = False,
    run_dir: RunDir = None,
    fresh: Fresh = False,
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    progress: ProgressMode = "auto",
    debug: Debug = False,
) -> None:
    """Quantize a checkpoint, export it, and prove the file in its runtime."""
    with session(progress, debug=debug) as reporter:
        resolved = choice.resolve()
        from pipeline import run

        output = output or _default_output(resolved.recipe)
        if dry_run:
            from pipeline.tables import print_plan

            found = run.plan(
                resolved,
                output=output,
                run_dir=run_dir,
                fresh=fresh,
                allow_pickle=allow_pickle,
                progress=reporter,
            )
            print_plan(found, _console())
            return
        report = run.deploy(
            resolved,
            output=output,
            run_dir=run_dir,
            overwrite=overwrite,
            fresh=fresh,
            allow_pickle=allow_pickle,
            command=shlex.join([*PROGRAM.split(), *sys.argv[1:]]),
            progress=reporter,
        )
        _finish(report, reporter)


@app.command(cls=TaughtCommand)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder of deploy.")],
    *,
    model: OriginalModel = None,
    allow_pickle: AllowPickle = False,
    progress: ProgressMode = "auto",
    debug: Debug = False,
) -> None:
    """Check an output folder's hashes and repeat its parity ladder."""
    with session(progress, debug=debug) as reporter:
        from pipeline import run

        report = run.verify(folder, model=model, allow_pickle=allow_pickle, progress=reporter)
        _finish(report, reporter)


@app.command(cls=TaughtCommand)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An output folder of deploy.")],
    *,
    target: Annotated[
        str, typer.Option("--target", metavar="FORMAT", help="gguf, onnx, or gguf,onnx.")
    ],
    output: Output = None,
    attention: Attention = None,
    model: OriginalModel = None,
    overwrite: Overwrite = False,
    fresh: Fresh = False,
    allow_pickle: AllowPickle = False,
    progress: ProgressMode = "auto",
    debug: Debug = False,
) -> None:
    """Write a finished quantization in another file format, without solving again."""
    with session(progress, debug=debug) as reporter:
        from pipeline import reexport

        report = reexport.reexport(
            folder,
            target,
            output=output or Path(f"{folder.resolve().name}-{target.replace(',', '-')}"),
            attention=attention,
            model=model,
            overwrite=overwrite,
            fresh=fresh,
            allow_pickle=allow_pickle,
            command=shlex.join([*PROGRAM.split(), *sys.argv[1:]]),
            progress=reporter,
        )
        _finish(report, reporter)


@app.command(cls=TaughtCommand)
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .gguf or .safetensors file.")],
    *,
    debug: Debug = False,
) -> None:
    """Print what is in a model file, without trusting it."""
    with session("quiet", debug=debug):
        from exporters.inspect import describe
        from pipeline.tables import print_description

        print_description(describe(file), _console())


@app.command(cls=TaughtCommand)
def compare(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="GGUF files; the first is the reference."),
    ],
    *,
    evaluation: Evaluation = None,
    context: Annotated[int, typer.Option("--context", metavar="N", help="Tokens a chunk.")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", metavar="N", help="Most chunks.")] = 40,
    progress: ProgressMode = "auto",
    debug: Debug = False,
) -> None:
    """Compare GGUF files of one model in stock llama.cpp."""
    with session(progress, debug=debug) as reporter:
        from pipeline.stages.compare import compare as compare_files
        from pipeline.tables import print_compared

        reporter.stage("compare", 1, 1)
        found = compare_files(
            files, evaluation=evaluation, context=context, chunks=chunks, progress=reporter
        )
        print_compared(found, _console())


@app.command(cls=TaughtCommand)
def ls(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND", help="types, presets, architectures, runtimes or transforms."
        ),
    ],
    *,
    debug: Debug = False,
) -> None:
    """List what is known: types, presets, architectures, runtimes, transforms."""
    with session("quiet", debug=debug):
        from pipeline.listings import LISTINGS
        from pipeline.tables import print_listing

        if kind not in LISTINGS:
            raise UsageError(f"unknown kind {kind!r}", fix=did_you_mean(kind, LISTINGS))
        print_listing(kind, LISTINGS[kind](), _console())


@app.command(cls=TaughtCommand)
@takes_recipe
def recipe(choice: RecipeChoice, *, debug: Debug = False) -> None:
    """Print the recipe as deploy would resolve it, with the origin of each value."""
    with session("quiet", debug=debug):
        from pipeline.recipe_files import to_toml

        resolved = choice.resolve()
        sys.stdout.write(to_toml(resolved.recipe, resolved.origins))


def _finish(report: Report, progress: Progress) -> None:
    """Print the tables; a red gate ends the command with its exit code."""
    from pipeline.tables import print_report

    progress.summary(report.to_dict())
    print_report(report, _console())
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _console() -> Console:
    """Standard output; wide where it is not a terminal, so that no table is folded."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _default_output(recipe: Recipe) -> Path:
    name = Path(recipe.model).resolve().name if recipe.model else "demo"
    return Path(f"{name}-{recipe.label}-{'-'.join(recipe.targets)}")
