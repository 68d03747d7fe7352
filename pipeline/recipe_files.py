"""Recipes from presets, TOML files and the command line, and back to TOML."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from pipeline.errors import UsageError
from pipeline.recipe import Recipe, Value, recipe_fields
from pipeline.suggest import did_you_mean, nearest
from pipeline.transforms import table_text

DEFAULT = "default"
OPTION = "command line"


@dataclass(frozen=True)
class ResolvedRecipe:
    """A validated recipe and the origin of each of its values.

    Attributes:
        recipe: The values.
        origins: Origin of each dotted key: ``default``, ``preset NAME``, ``file PATH``, ``--set``
            or ``command line``.
    """

    recipe: Recipe
    origins: Mapping[str, str]


def preset_names() -> list[str]:
    """Names of the presets that the package ships, sorted."""
    folder = resources.files("pipeline") / "presets"
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in folder.iterdir()
        if entry.name.endswith(".toml")
    )


def preset_text(name: str) -> str:
    """TOML text of a preset.

    Raises:
        UsageError: No preset has this name.
    """
    if name not in preset_names():
        raise UsageError(f"unknown preset {name!r}", fix=did_you_mean(name, preset_names()))
    return (resources.files("pipeline") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def load_recipe(
    preset: str = "balanced",
    file: Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Value] | None = None,
) -> ResolvedRecipe:
    """Layer defaults < preset < file < overrides < options, and validate the result.

    Args:
        preset: Name of a shipped preset.
        file: TOML recipe; may hold any subset of the keys.
        overrides: ``key=value`` texts. The value is TOML, or else taken as text; an empty value
            unsets an optional key.
        options: Values of explicit command-line options by dotted key; None means not given.

    Raises:
        UsageError: Unknown preset or key, a value outside its constraints, or a file that is not
            readable TOML. Names the origin of the value and the fix.
    """
    layers: list[tuple[str, dict[str, Any]]] = [
        (f"preset {preset}", _parse(preset_text(preset), f"preset {preset}"))
    ]
    if file is not None:
        layers.append((f"file {file}", _parse(_read(file), f"file {file}")))
    layers += [("--set", _parse_override(text)) for text in overrides]
    given = {key: value for key, value in (options or {}).items() if value is not None}
    layers.append((OPTION, given))

    values: dict[str, Any] = {}
    origins = dict.fromkeys(recipe_fields(), DEFAULT)
    for origin, layer in layers:
        for key, value in layer.items():
            _check_key(key, origin)
            values[key] = value
            origins[key] = origin
    return ResolvedRecipe(_validate(values, origins), origins)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the recipe {file}",
            why=str(error),
            fix="give the path of a TOML file; `python -m pipeline recipe` prints a complete one",
        ) from error


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        return dict(_leaves(_with_transforms(tomllib.loads(text), origin)))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{origin} is not valid TOML",
            why=str(error),
            fix='strings need quotes: type = "Q4_0"',
        ) from error


def _with_transforms(table: dict[str, Any], origin: str) -> dict[str, Any]:
    """The tables ``[[transform]]`` as the texts that the key ``transforms`` holds."""
    if "transform" not in table:
        return table
    tables = table.pop("transform")
    try:
        if "transforms" in table or not isinstance(tables, list):
            raise ValueError("give either [[transform]] tables or one list of transforms")
        texts = [table_text(one) for one in tables]
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"the transforms of {origin} cannot be read",
            why=str(error),
            fix='for example [[transform]] with kind = "rotate", or transforms = ["rotate"]',
        ) from error
    return {**table, "transforms": texts}


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = (part.strip() for part in text.partition("="))
    if not separator or not key:
        raise UsageError(
            f"--set {text!r} is not of the form key=value",
            fix="for example --set calibration.samples=64",
        )
    return {key: _parse_value(value)}


def _parse_value(text: str) -> Any:
    if not text:
        return None
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _check_key(key: str, origin: str) -> None:
    known = recipe_fields()
    if key in known:
        return
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise UsageError(
            f"{key} is a section of the recipe, not a key ({origin})",
            fix=f"set one of {', '.join(inside)}",
        )
    section, _, leaf = key.rpartition(".")
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = by_leaf.get(leaf) or nearest(key, known)
    if not section and leaf not in by_leaf:
        near = by_leaf.get(nearest(leaf, by_leaf) or "")
    hint = f"did you mean {near}? " if near else ""
    raise UsageError(
        f"unknown recipe key {key!r} ({origin})",
        fix=f"{hint}`python -m pipeline recipe` prints every key",
    )


def _validate(values: Mapping[str, Any], origins: Mapping[str, str]) -> Recipe:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    try:
        return Recipe.model_validate(nested)
    except ValidationError as error:
        raise _explain(error, origins) from error


def _explain(error: ValidationError, origins: Mapping[str, str]) -> UsageError:
    """The first violation, with the key, its origin, the rule and what the key is for."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    key = next(
        joined
        for length in range(len(location), 0, -1)
        if (joined := ".".join(location[:length])) in recipe_fields()
    )
    return UsageError(
        f"{key} = {first['input']!r} is not valid ({origins[key]})",
        why=first["msg"].removeprefix("Value error, "),
        fix=_advice(key, first["input"]),
    )


def _advice(key: str, found: object) -> str:
    field = recipe_fields()[key]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if choices and isinstance(found, str):
        return did_you_mean(found, choices)
    default = field.get_default()
    example = f"leave {key} out" if default is None else f"{key} = {_toml_value(default)}"
    return f"for example {example}. {field.description}"


def to_toml(recipe: Recipe, origins: Mapping[str, str] | None = None) -> str:
    """A recipe as a TOML file that `load_recipe` reads back to the same values.

    Args:
        recipe: The values. Unset ones appear as comments: TOML has no null.
        origins: When given, each key is preceded by its description and followed by its origin.
    """
    lines: list[str] = []
    section = ""
    for key, value in recipe.flat().items():
        table, _, name = key.rpartition(".")
        if table != section:
            section = table
            lines += ["", f"[{table}]"]
        line = f"# {name} = unset" if value is None else f"{name} = {_toml_value(value)}"
        if origins is not None:
            lines.append(f"# {recipe_fields()[key].description}")
            line += f"  # {_comment(origins[key])}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _toml_value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON escapes are TOML escapes; DEL is the one character that only TOML forbids.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return repr(value)


def _comment(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
