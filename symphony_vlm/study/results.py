"""Writes what a study found: results.json, a page of Markdown tables, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from symphony_vlm.errors import InputError
from symphony_vlm.files import write_json, write_text
from symphony_vlm.study.drift import drift_rows
from symphony_vlm.study.figures import write_figures
from symphony_vlm.study.page import page_text
from symphony_vlm.study.scores import ArmScores
from symphony_vlm.study.selection import Chosen
from symphony_vlm.study.setting import Part, Setting
from symphony_vlm.study.tables import arm_rows, comparison_rows, pairs_of_arms, pairs_of_choices, pairs_of_controls

__all__ = ["write_results"]


def write_results(
    setting: Setting,
    scores: Mapping[Part, Mapping[str, Mapping[str, ArmScores]]],
    chosen: Sequence[Chosen],
    output: Path,
    *,
    command: str,
    n_jobs: tuple[int, int],
    provenance: dict[str, Any],
) -> Path:
    """Writes ``results.json``, ``results.md`` and the figures.

    Args:
        setting: what was done.
        scores: by part, data set and arm; seeds that an arm or its baseline has not finished are in no comparison.
        chosen: what the study chose, if anything.
        output: the study's folder.
        command: that runs it again.
        n_jobs: that are done, and all.
        provenance: versions, hardware and the like.

    Returns:
        The page.

    Raises:
        InputError: nothing is finished.
    """
    if not any(arms for data in scores.values() for arms in data.values()):
        raise InputError("no cell is finished", where=str(output), remedy="Run the study.")
    arms: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    against_controls: list[dict[str, Any]] = []
    drift: list[dict[str, Any]] = []
    for part, found in scores.items():
        arms += arm_rows(setting, part, found)
        # What was chosen is tested by the names of the choices; an arm may be the best of several.
        tested = pairs_of_choices(chosen) if chosen and part == "test" else pairs_of_arms(setting)
        comparisons += comparison_rows(setting, part, tested, found)
        against_controls += comparison_rows(setting, part, pairs_of_controls(setting), found)
        baselines = {name: arm.baseline for name, arm in setting.study.arms.items()}
        for data, of_data in found.items():
            drift += [{"part": part, "data": data, **row} for row in drift_rows(of_data, baselines)]
    document = {
        "study": setting.study.model_dump(mode="json"),
        "command": command,
        "unit": setting.unit.name,
        "n_jobs_done": n_jobs[0],
        "n_jobs": n_jobs[1],
        "choices": [asdict(choice) for choice in chosen],
        "arms": arms,
        "comparisons": comparisons,
        "against_controls": against_controls,
        "drift": drift,
        "provenance": provenance,
    }
    write_json(output / "results.json", document)
    # Training is the same whatever part of the data it is measured on: the part with all arms is drawn.
    drawn = next(part for part, found in scores.items() if found)
    figures = [name for data, found in scores[drawn].items() for name in write_figures(setting, found, data, output)]
    page = output / "results.md"
    write_text(page, page_text(setting, document, figures))
    return page
