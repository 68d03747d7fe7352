"""Where a checkpoint comes from: a folder, or the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import InputError, UsageError

# Never *.py: code of strangers has no business on this machine.
METADATA_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "README.md",
    "LICENSE*",
)
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")
PICKLED_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+\Z", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")


@dataclass(frozen=True)
class Location:
    """A checkpoint on this machine, perhaps with its weights still to be fetched.

    Attributes:
        source: What the user gave.
        folder: Where the files are.
        repo: The hub repository, or None for a folder of the user.
        revision: The exact commit if the hub told, else what was asked for.
    """

    source: str
    folder: Path
    repo: str | None = None
    revision: str | None = None


def locate(source: str | Path, revision: str | None) -> Location:
    """Finds a checkpoint. From the hub it fetches only the small files: those decide the rest.

    Args:
        source: A folder, or a hub id ``owner/name``. A folder that exists wins.
        revision: Branch, tag or commit on the hub.

    Raises:
        InputError: There is no such folder, or the hub did not deliver.
        UsageError: A revision was given for a folder.
    """
    text, folder = str(source), Path(source).expanduser()
    if _is_dir(folder):
        if revision is not None:
            raise UsageError(
                f"revision {revision!r} was given for the folder {text}",
                why="only models on the hub have revisions",
                fix="leave it out, or move the folder away if you mean the hub id",
            )
        return Location(text, folder)
    if folder.exists():
        raise InputError(
            f"{text} is a file", fix="give the folder that holds config.json and the weights"
        )
    if isinstance(source, Path) or not _HUB_ID.match(text):
        raise InputError(
            f"no such folder: {text}",
            why="it does not look like a hub id (owner/name) either, so the hub was not asked",
            fix="check the path",
        )
    snapshot = _download(text, revision, METADATA_FILES)
    commit = snapshot.name if _COMMIT.match(snapshot.name) else revision
    return Location(text, snapshot, text, commit)


def _is_dir(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError as error:  # no permission, name too long, loop of links
        raise InputError(f"cannot look at {folder}", why=str(error)) from error


def fetch_weights(location: Location, allow_pickle: bool) -> None:
    """Downloads the weights of a hub checkpoint, if they are not here yet. Raises InputError."""
    if location.repo is not None:
        patterns = WEIGHT_FILES + (PICKLED_FILES if allow_pickle else ())
        _download(location.repo, location.revision, patterns)


def _download(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=list(patterns)
            )
        )
    except Exception as error:  # the client raises errors of whichever HTTP library it is built on
        what = f"cannot get {repo!r} from the Hugging Face hub" + (
            f" at revision {revision!r}" if revision else ""
        )
        cause, fix = _diagnose(error)
        raise InputError(
            what, why=f"no folder of that name exists here, and on the hub: {cause}", fix=fix
        ) from error


def _diagnose(error: Exception) -> tuple[str, str]:
    """(why, fix) for an error of the hub client."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "access is restricted", "accept its licence on the hub, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such repository, or it is private",
            "check the spelling; for a private one `hf auth login` first",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision", "check the branch, tag or commit"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "it cannot be reached (offline?) and the model is not in the local cache",
            "connect, or download the model elsewhere and give its folder",
        )
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__, "try again, or give a folder"
