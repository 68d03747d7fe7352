"""Where the result of a run goes, and where its finished blocks are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.storage import OUTPUT_MARKER, check_output


@dataclass(frozen=True)
class Order:
    """Where a run's result goes, and how it deals with what is there.

    Attributes:
        output: Folder to create, absolute.
        run_dir: Where finished blocks are kept; None: beside `output`, and removed after success.
        overwrite: Replace an earlier output folder.
        fresh: Ignore finished blocks.
        command: The command line, for the model card.
    """

    output: Path
    run_dir: Path | None
    overwrite: bool
    fresh: bool
    command: str

    @property
    def folder(self) -> Path:
        """Where finished blocks are kept."""
        return run_folder(self.output, self.run_dir)

    def check(self) -> None:
        """Find out before any work whether the result can be delivered. Raises PipelineError."""
        run_folder(self.output, self.run_dir)
        if self.overwrite or not (self.output / OUTPUT_MARKER).is_file():
            check_output(self.output, overwrite=self.overwrite)


def run_folder(output: Path, run_dir: Path | None) -> Path:
    """Where finished blocks are kept; never a place that delivering would touch."""
    if not output.name:
        raise UsageError(f"the output {output} has no name", fix="give a folder: --output DIR")
    folder = output.with_name(f"{output.name}.piso-run") if run_dir is None else run_dir.resolve()
    if folder == output or output in folder.parents or folder in output.parents:
        raise UsageError(
            f"run directory {folder} and output {output} overlap",
            fix="choose a --run-dir apart from the output",
        )
    return folder
