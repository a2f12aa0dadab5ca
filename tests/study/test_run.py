"""A whole study, at the smallest size, twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_cells import picture_study
from rich.console import Console

from symphony_vlm.errors import InputError
from symphony_vlm.study.run import run_study


@pytest.mark.slow
def test_a_study_with_pictures_continues_and_repeats_to_the_same_figures(tmp_path: Path) -> None:
    study = picture_study(settings=["monitor.report_to=[]", "stages.instruct.save_fraction=1.0"])

    def run(folder: Path) -> dict[str, Any]:
        result = run_study(study, folder, at_once=2, threads=1, command="study", console=Console(quiet=True))
        assert result.failures == {}
        document: dict[str, Any] = json.loads(result.results.read_text())
        return document

    first = run(tmp_path / "first")
    assert first["n_jobs_done"] == first["n_jobs"] == 9
    assert [row["seeds"] for row in first["arms"]] == [[0, 1], [0, 1]]
    assert first["arms"][1]["routing"]["off_diagonal_mass"] > 0
    predictions = tmp_path / "first" / "evaluation" / "test" / "seed0" / "results" / "smoe-seed0-run" / "predictions"
    asked = {path.name: len(path.read_text().splitlines()) for path in predictions.glob("*.jsonl")}
    assert asked["scenes.none.0.jsonl"] == 16 and asked["scenes.fog.1.jsonl"] == 8 and len(asked) == 7
    # A cell that is lost is made again, and what needs it, and nothing else.
    lost = tmp_path / "first" / "cells" / "pictures" / "smoe" / "seed0"
    shutil.rmtree(lost)
    kept = (tmp_path / "first" / "start" / "seed0" / "cell.json").stat().st_mtime_ns
    again = run(tmp_path / "first")
    assert (tmp_path / "first" / "start" / "seed0" / "cell.json").stat().st_mtime_ns == kept
    other = run(tmp_path / "second")
    for document in (again, other):
        assert document["comparisons"] == first["comparisons"]
        for one, two in zip(first["arms"], document["arms"], strict=True):
            assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_a_study_whose_cells_all_fail_says_why(tmp_path: Path) -> None:
    study = picture_study(
        recipe="cifar10_vqa",
        arms={"smoe": []},
        settings=["stages=[{name: instruct, kind: multimodal, upcycle: true, train: {projector: 1.0e-3}}]"],
        pictures={"train": str(tmp_path / "a.json"), "test": str(tmp_path / "b.json")},
        seeds=[0],
    )
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(InputError, match=r"every cell failed; cells/pictures/s.* said"):
        run_study(study, tmp_path / "out", at_once=2, threads=1, console=Console(quiet=True))
