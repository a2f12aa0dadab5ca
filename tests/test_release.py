"""The files around the code: versions agree, named files and make targets exist, settings files can be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import symphony_vlm

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', PYPROJECT, re.M)
    assert symphony_vlm.__version__ == version
    assert _yaml(ROOT / "CITATION.cff")["version"] == version


def test_the_citation_names_the_project_and_the_paper() -> None:
    citation = _yaml(ROOT / "CITATION.cff")
    assert citation["authors"] == [{"name": "The symphony_vlm authors"}]
    assert citation["license"] in PYPROJECT
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2510.16411"


def test_every_supported_python_is_tested() -> None:
    jobs = _yaml(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert jobs["test"]["strategy"]["matrix"]["python"] == classified
    assert {"lint", "test", "package", "docs"} <= set(jobs)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_calls_make_targets_that_exist(path: Path) -> None:
    workflow = _yaml(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] > 0
        commands = "\n".join(step.get("run", "") for step in job["steps"])
        assert set(re.findall(r"^make ([a-z-]+)", commands, re.M)) <= TARGETS


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_issue_forms_can_be_read(path: Path) -> None:
    form = _yaml(path)
    assert path.name == "config.yml" or {"name", "description", "body"} <= set(form)


def test_the_hooks_call_what_make_lint_calls() -> None:
    (repository,) = _yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    entries = {hook["id"]: hook["entry"] for hook in repository["hooks"]}
    assert {"ruff-check", "ruff-format", "mypy"} <= set(entries)
    for path in re.findall(r"tests/\S+\.py", " ".join(entries.values())):
        assert (ROOT / path).is_file()


def test_the_tour_names_files_and_targets_that_exist() -> None:
    inside = [Path(), Path("symphony_vlm"), *(p.parent for p in Path(ROOT / "symphony_vlm").rglob("__init__.py"))]
    folders = [ROOT / folder for folder in (*inside, Path("tests/moe"))]
    named = re.findall(r"(?<![\w/])([\w./-]+\.(?:py|yaml|md|json|toml|cff))\b", CONTRIBUTING)
    examples = {"utils.py", "FILE.py"}
    missing = [
        name
        for name in named
        if "NAME" not in name and name not in examples and not any((folder / name).exists() for folder in folders)
    ]
    assert len(named) > 50 and missing == []
    assert set(re.findall(r"^    make ([a-z-]+)", CONTRIBUTING, re.M)) <= TARGETS
