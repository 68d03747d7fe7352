"""Every failure that a user can cause or meet, each with its exit status.

A message says what happened, why, and what to do, in that order. Anything that is not a
`PipelineError` is a bug in this project and leaves the process with status 1.
"""

from __future__ import annotations


class PipelineError(Exception):
    """Base of all expected failures.

    Args:
        what: What happened, naming the object (file, tensor, option).
        why: The cause, as far as it is known.
        fix: What the user can do about it.
    """

    exit_code = 1
    summary = "internal error: a bug in this project"

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class UsageError(PipelineError):
    """An option, recipe key or value that makes no sense."""

    exit_code = 2
    summary = "usage or recipe error"


class QualityGateError(PipelineError):
    """The run finished and the file is right, but it lost more quality than the recipe allows."""

    exit_code = 3
    summary = "finished, but the quality gate failed (the output is kept, marked unverified)"


class InputError(PipelineError):
    """An input that is missing, corrupt, hostile or not finite."""

    exit_code = 10
    summary = "input rejected: missing, corrupt, hostile or not finite"


class UnsupportedError(PipelineError):
    """An architecture, tokenizer, type or width that the target cannot represent."""

    exit_code = 11
    summary = "architecture, tokenizer, type or width not supported"


class ResourceError(PipelineError):
    """Memory, disk or permissions are not sufficient."""

    exit_code = 12
    summary = "does not fit: memory, disk space or permissions"


class BusyError(PipelineError):
    """Another process works in the same run directory."""

    exit_code = 13
    summary = "another process holds this run directory"


class VerificationError(PipelineError):
    """The exported file is not what the solver decided on."""

    exit_code = 14
    summary = "the output failed verification (a parity gate is red)"


class InterruptedRunError(PipelineError):
    """Stopped by a signal after resumable work was saved."""

    exit_code = 75
    summary = "interrupted; the same command continues"


EXIT_CODES: dict[int, str] = {
    0: "done and verified",
    **{
        kind.exit_code: kind.summary
        for kind in (
            PipelineError,
            UsageError,
            QualityGateError,
            InputError,
            UnsupportedError,
            ResourceError,
            BusyError,
            VerificationError,
            InterruptedRunError,
        )
    },
    130: "Ctrl-C before anything resumable existed",
}
