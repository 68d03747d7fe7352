"""Rules that every module keeps: size, direction of imports, lean start, documentation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pipeline
from pipeline.cli_help import EXAMPLES
from pipeline.errors import EXIT_CODES

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "exporters", "runtimes")
MAX_LINES = {"module": 400, "function": 60, "class": 200}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMES = {path: str(path.relative_to(ROOT)) for path in SOURCES}

ALLOWED = {
    "exporters": ("exporters", "pipeline.quantization.formats", "pipeline.errors"),
    "runtimes": (
        "runtimes",
        "exporters.gguf.names",
        "exporters.gguf.reader",
        "pipeline.quantization.formats",
        "pipeline.errors",
    ),
    "pipeline.quantization": ("pipeline.quantization", "pipeline.errors", "pipeline.kernels"),
}
"""What a package may import of this project; packages that are not named may import everything."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, at_start_only: bool = False) -> Iterator[str]:
    """Full names of what a module imports; with `from a import b` both a and a.b."""
    nodes = list(top_level(tree(path))) if at_start_only else list(ast.walk(tree(path)))
    package = (
        module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    )
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def top_level(module: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import: not those in functions or under TYPE_CHECKING."""
    for node in module.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from (child for child in ast.walk(node) if isinstance(child, ast.stmt))


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def definitions(path: Path) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, Function | ast.ClassDef):
            yield f"{NAMES[path]}:{node.lineno} {node.name}", node


def lines_of(node: Function | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=NAMES.get)
def test_size(path: Path) -> None:
    sizes = {NAMES[path]: ("module", len(path.read_text(encoding="utf-8").splitlines()))}
    for name, node in definitions(path):
        sizes[name] = ("class" if isinstance(node, ast.ClassDef) else "function", lines_of(node))
    assert not {k: (kind, n) for k, (kind, n) in sizes.items() if n > MAX_LINES[kind]}


@pytest.mark.parametrize("path", SOURCES, ids=NAMES.get)
def test_imports_point_the_right_way(path: Path) -> None:
    rules = [
        allowed for package, allowed in ALLOWED.items() if within(module_name(path), (package,))
    ]
    ours = [name for name in imports(path) if within(name, PACKAGES)]
    assert [name for allowed in rules for name in ours if not within(name, allowed)] == []


@pytest.mark.parametrize("path", SOURCES, ids=NAMES.get)
def test_optimum_and_llama_cpp_are_never_needed_to_import(path: Path) -> None:
    assert not any(within(name, ("optimum",)) for name in imports(path))
    assert not any(within(name, ("llama_cpp",)) for name in imports(path, at_start_only=True))


@pytest.mark.parametrize("path", SOURCES, ids=NAMES.get)
def test_what_is_public_is_documented(path: Path) -> None:
    missing = [] if ast.get_docstring(tree(path)) or not tree(path).body else [NAMES[path]]
    for holder in (tree(path), *(n for n in tree(path).body if isinstance(n, ast.ClassDef))):
        for node in holder.body:
            public = isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node) and not is_override(node):
                missing.append(f"{NAMES[path]}:{node.lineno} {node.name}")
    assert missing == []


def is_override(node: ast.AST) -> bool:
    """Whether a definition repeats a documented one: overload or override."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(d).rpartition(".")[2] in ("overload", "override") for d in decorators)


@pytest.mark.parametrize("path", SOURCES, ids=NAMES.get)
def test_no_print_and_no_assert(path: Path) -> None:
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: raise an error that explains"
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called != "print", f"line {node.lineno}: use Progress"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("exporters.inspect", {"torch", "transformers"}),
        ("exporters.onnx", {"torch", "onnx", "onnx_ir"}),
        ("runtimes.onnxruntime", {"transformers", "onnx", "onnxruntime"}),
        ("runtimes.llamacpp_worker", {"torch", "transformers"}),
        ("pipeline.progress", {"torch", "transformers", "numpy"}),
        ("pipeline.cli", {"torch", "transformers", "numpy"}),
        ("pipeline.errors", {"torch", "transformers", "numpy"}),
    ],
)
def test_lean_import(module: str, heavy: set[str]) -> None:
    code = (
        f"import sys, {module}\n"
        f"loaded = {heavy} & sys.modules.keys()\n"
        "sys.exit(', '.join(loaded) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_code_in_the_embedded_model() -> None:
    model = Path(pipeline.__file__).parent / "demo" / "model"
    suffixes = {path.suffix for path in model.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".txt"}


def test_readme_names_every_command_and_exit_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = {command for command in EXAMPLES if command}
    assert {c for c in commands if not re.search(rf"python -m pipeline {c}\b", text)} == set()
    rows = {int(code) for code in re.findall(r"^\|\s*(\d+)\s*\|", text, re.MULTILINE)}
    assert rows >= EXIT_CODES.keys()


def test_top_level_is_what_the_design_says() -> None:
    shown = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    # Only what is tracked: the README's first command leaves its output here.
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        shown = {name.partition("/")[0] for name in listed.stdout.split()}
        shown = {name for name in shown if not name.startswith(".")}
    design = {"pyproject.toml", "Dockerfile", "README.md", *PACKAGES, "tests"}
    assert shown - design <= {"shared"}
