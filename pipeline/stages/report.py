"""What lies beside the model file: recipe, manifest, model card."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.card import METHODS, WEIGHTED, render_card
from pipeline.errors import InputError
from pipeline.json_text import json_text
from pipeline.recipe_files import ResolvedRecipe, to_toml
from pipeline.report import OutputFile, Report
from pipeline.storage import OUTPUT_MARKER as MANIFEST
from pipeline.targets import TARGETS

RECIPE = "recipe.toml"
CARD = "README.md"
SCHEMA = 1
MANIFEST_KEYS = {"schema", "model_file", "identity", "input", "texts", "recipe", "tensors"} | {
    "files",
    "report",
}


def deliver(
    staging: Path,
    report: Report,
    resolved: ResolvedRecipe,
    record: dict[str, Any],
) -> Report:
    """Write recipe, card and manifest beside the model file.

    Args:
        staging: Folder that holds the model file.
        report: What was found out.
        resolved: The recipe.
        record: Further content of the manifest, with the exact command.

    Returns:
        The report with the files of the folder.
    """
    (staging / RECIPE).write_text(to_toml(resolved.recipe), encoding="utf-8")
    listed = replace(report, files=tuple(_entry(p) for p in sorted(staging.iterdir())))
    on_hub = record["input"]["revision"] is not None
    base = record["input"]["source"] if on_hub else None
    packed = record["input"].get("packed")
    methods = (packed, "repacked") if packed else METHODS
    if resolved.recipe.imatrix is not None:
        methods = WEIGHTED
    card = render_card(listed, resolved.recipe, record["command"], base, methods=methods)
    (staging / CARD).write_text(card, encoding="utf-8")
    files = tuple(_entry(path) for path in sorted(staging.iterdir()))
    manifest = {
        "schema": SCHEMA,
        **record,
        "files": {f.name: {"sha256": f.sha256, "size": f.size_bytes} for f in files},
        "report": report.to_dict(),
    }
    (staging / MANIFEST).write_text(json_text(manifest, indent=2), encoding="utf-8")
    return replace(report, files=(*files, _entry(staging / MANIFEST)))


def _entry(path: Path) -> OutputFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return OutputFile(path.name, path.stat().st_size, digest)


def check_files(folder: Path) -> dict[str, Any]:
    """Read an output folder's manifest and check every file against it.

    Raises:
        InputError: No manifest, not one of ours, or a file that is missing or altered.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        missing = MANIFEST_KEYS - set(manifest)
        if missing:
            raise KeyError(f"no {', '.join(sorted(missing))}")
        files = {name: (str(f["sha256"]), int(f["size"])) for name, f in manifest["files"].items()}
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is not an output folder", why=f"there is no {MANIFEST}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged", why=str(error), fix="deploy again") from error
    if manifest.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {manifest.get('schema')}, not {SCHEMA}")
    for name, (sha256, size) in files.items():
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing", fix="deploy again")
        entry = _entry(folder / name)
        if (entry.sha256, entry.size_bytes) != (sha256, size):
            raise InputError(
                f"{folder / name} is not the file that was delivered",
                why="its SHA-256 differs from the manifest's",
                fix="deploy again, or fetch the folder again",
            )
    models = [manifest, *(manifest[key] for key in TARGETS if key in manifest)]
    if any(model["model_file"] not in files for model in models):
        raise InputError(f"{path} lists no model file", fix="deploy again")
    return manifest
