"""Links of the README and the pages lead somewhere, every page is in the menu, and the commands shown exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from symphony_vlm.cli import app

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *PAGES]
FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _anchors(document: Path) -> set[str]:
    """The ids that headings get on the site: lower case, hyphens for spaces, other signs left out."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[-\s]+", "-", word) for word in words}


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_relative_links_lead_to_a_file_and_a_heading(document: Path) -> None:
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), f"{_name(document)} links to {target}"
        assert found.is_relative_to(REPOSITORY), f"{_name(document)} links out of the repository: {target}"
        assert not anchor or anchor in _anchors(found), f"{_name(document)}: no heading {target}"


def _entries(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for value in nav.values() if isinstance(nav, dict) else nav:
            yield from _entries(value)


def test_every_page_is_in_the_menu_once() -> None:
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = list(_entries(settings["nav"]))
    assert sorted(listed) == [str(page.relative_to(DOCS)) for page in PAGES]


def test_every_module_of_the_reference_exists() -> None:
    named = [
        name
        for page in (DOCS / "reference").glob("*.md")
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)
    ]
    assert len(set(named)) == len(named) > 50
    for name in named:
        path = REPOSITORY / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def _commands(document: Path) -> Iterator[list[str]]:
    """The words of each line that calls the command line, continued lines put together."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?: {4}|\$ )?(?:\.venv/bin/)?symphony-vlm (\w.*)$", text, re.MULTILINE):
        yield shlex.split(line.partition(" #")[0])


def test_commands_in_documents_have_the_options_shown() -> None:
    seen = set()
    for document in DOCUMENTS:
        for words in _commands(document):
            command, name = COMMANDS.get(words[0]), words[0]
            if name in ("data", "config"):
                command, name = command.commands.get(words[1]), f"{name} {words[1]}"
            assert command is not None, f"{_name(document)}: symphony-vlm {name}"
            options = {option for parameter in command.params for option in parameter.opts} | {"--debug", "--help"}
            for word in words:
                if word.startswith("--"):
                    assert word.partition("=")[0] in options, f"{_name(document)}: {name} {word}"
            seen.add(name)
    assert len(seen) > 15


def test_the_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) < 200
