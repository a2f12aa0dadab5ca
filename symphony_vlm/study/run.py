"""A study from its texts to its tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_vlm.config.loading import load_recipe
from symphony_vlm.errors import InputError
from symphony_vlm.study.cells import study_cells
from symphony_vlm.study.configuration import Study
from symphony_vlm.study.runner import run_cells
from symphony_vlm.study.tables import write_results
from symphony_vlm.study.text_parts import write_parts
from symphony_vlm.training.provenance import provenance

__all__ = ["StudyResult", "run_study"]


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Where the tables are, and what failed."""

    results: Path
    page: Path
    n_cells: int
    failures: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The summary of ``--json``."""
        return {
            "results": str(self.results),
            "tables": str(self.page),
            "n_cells": self.n_cells,
            "n_failed": len(self.failures),
        }


def run_study(study: Study, output: Path, *, jobs: int, threads: int, console: Console) -> StudyResult:
    """Runs the cells that are not done and writes the tables of all.

    Args:
        study: what to do.
        output: its folder: ``texts/``, ``cells/``, ``results.json``, ``results.md``.
        jobs: cells at a time.
        threads: of each.
        console: where progress goes.

    Raises:
        InputError: a recipe, a setting or a text cannot be used, or every cell failed.
    """
    output = output.resolve()
    for name, arm in study.arms.items():
        recipe = load_recipe(study.recipe, [*study.settings, *arm.settings])
        if not recipe.is_language:
            raise InputError(
                f"{study.recipe!r} has no language stages", where=f"arm {name!r}", remedy="Name a recipe that has."
            )
    parts = {name: write_parts(text, output / "texts" / name) for name, text in study.texts.items()}
    cells = study_cells(study, output, parts)
    failures = run_cells(cells, jobs=jobs, threads=threads, console=console)
    if not any(cell.is_done() for cell in cells):
        name, said = next(iter(failures.items()))
        raise InputError(f"every cell failed; {name} said: {said}", where=study.name)
    page = write_results(study, cells, output, provenance(study=study.name, jobs=jobs, threads=threads))
    return StudyResult(results=output / "results.json", page=page, n_cells=len(cells), failures=failures)
