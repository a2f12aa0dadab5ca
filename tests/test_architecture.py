"""Rules about the source itself: who may import whom, no stray output, files of a readable length."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "symphony_vlm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 420

FORBIDDEN = {
    "corruptions": {
        *("model", "moe", "data", "training", "evaluation", "serving", "config", "cli", "integrations", "quickstart")
    },
    "cards": {
        *("model", "moe", "data", "training", "evaluation", "serving", "config", "cli", "integrations", "quickstart"),
        *("corruptions", "study", "doctor"),
    },
    "moe": {"model", "data", "training", "evaluation", "serving", "config", "cli", "integrations", "quickstart"},
    "model": {"training", "evaluation", "serving", "config", "cli", "integrations", "quickstart"},
    "data": {"model", "moe", "training", "evaluation", "serving", "config", "cli", "integrations", "quickstart"},
    # Checking a recipe asks the other parts for the names they know (templates, corruptions), inside functions.
    "config": {"model", "training", "serving", "cli", "integrations", "quickstart"},
    "training": {"evaluation", "serving", "cli", "integrations", "quickstart"},
    "evaluation": {"serving", "cli", "integrations", "quickstart"},
    "serving": {"training", "evaluation", "cli", "integrations", "quickstart"},
    # Harnesses of other people: they stand beside the command line, and nothing here needs them.
    "integrations": {"training", "serving", "cli", "quickstart"},
    "study": {"serving", "cli", "integrations", "quickstart"},
    "doctor": {"data", "training", "evaluation", "serving", "cli", "integrations", "quickstart", "study"},
    "cli": set(),
}
"""For each part, those it must not import: moe <- model <- {training, evaluation, serving} <- cli, quickstart.

What connects other programs (integrations) stands beside cli.
"""

FOLDERS_OUTSIDE = {"train", "eval", "demo", "configs", "tests", "benchmarks"}
ONLY_INSIDE_FUNCTIONS = {
    "bitsandbytes",
    "deepspeed",
    "flash_attn",
    "gradio",
    "lmms_eval",
    "open_clip",
    "peft",
    "pycocoevalcap",
    "sacrebleu",
    "starlette",
    "timm",
    "uvicorn",
    "wandb",
}


def imports(node: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import below a node."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                parents = package.split(".")[: len(package.split(".")) - child.level + 1]
                base = ".".join([*parents, base] if base else parents)
            yield from ((child.lineno, f"{base}.{alias.name}") for alias in child.names)


def top_level(path: Path) -> Iterator[tuple[int, str]]:
    """Imports that run when the module is imported, type-checking blocks left out."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for statement in body:
            if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
                yield from statements(statement.orelse)
            elif isinstance(statement, (ast.Import, ast.ImportFrom)):
                yield statement
            else:
                for field in ("body", "orelse", "handlers", "finalbody"):
                    yield from statements(getattr(statement, field, []))

    for statement in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        yield from imports(statement, path)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("part", FORBIDDEN)
def test_a_part_imports_only_those_below_it(part: str) -> None:
    """Imports inside functions count too: a circle is a circle."""
    found = [
        f"{name_of(path)}:{line}: {name}"
        for path in sorted((PACKAGE / part).rglob("*.py"))
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), path)
        if name.startswith("symphony_vlm.") and name.split(".")[1] in FORBIDDEN[part]
    ]
    assert found == []


def test_every_part_of_the_package_has_its_rule() -> None:
    parts = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert parts == set(FORBIDDEN)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_in_the_package_imports_the_folders_around_it(path: Path) -> None:
    found = [
        f"{line}: {name}"
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), path)
        if name.split(".")[0] in FOLDERS_OUTSIDE
    ]
    assert found == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_optional_and_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    found = [f"{line}: {name}" for line, name in top_level(path) if name.split(".")[0] in ONLY_INSIDE_FUNCTIONS]
    assert found == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_prints(path: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_too_long_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    "module", ["moe/configuration.py", "errors.py", "text.py", "files.py", "__init__.py", "_imports.py"]
)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = {"torch", "transformers", "numpy", "PIL"}
    assert not heavy & {name.split(".")[0] for _, name in top_level(PACKAGE / module)}


def test_every_package_is_installed() -> None:
    """The list in pyproject.toml is written by hand: a folder that it lacks would be missing from the wheel."""
    listed = re.findall(r'^  "(symphony_vlm[.\w]*)",$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    settings = {f"symphony_vlm._configs.{path.name}" for path in (ROOT / "configs").iterdir()}
    assert set(listed) == folders | settings | {"symphony_vlm._configs"}
