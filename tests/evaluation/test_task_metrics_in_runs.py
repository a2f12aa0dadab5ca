"""An evaluation with a benchmark's own figures: pictures are asked about, and results have every metric."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from symphony_vlm.evaluation.report import write_report
from symphony_vlm.evaluation.report_data import collect, load_evaluation
from symphony_vlm.evaluation.runner import EvaluationPlan, evaluate
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task


@pytest.fixture(scope="module")
def mme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subtasks with three pictures each, as released; one picture is broken."""
    folder = tmp_path_factory.mktemp("mme")
    for subtask in ("count", "code_reasoning"):
        (folder / subtask).mkdir()
        for number in range(3):
            Image.new("RGB", (40, 40), (80 * number, 90, 10)).save(folder / subtask / f"{number}.png")
            text = "Is it dark? Please answer yes or no.\tYes\nIs it light? Please answer yes or no.\tNo\n"
            (folder / subtask / f"{number}.txt").write_text(text)
    (folder / "count" / "2.png").write_bytes(b"broken")
    return folder


def test_results_have_the_figures_of_the_task(mme: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    plan = EvaluationPlan(
        model=str(tiny_model_folder),
        tasks=("mme",),
        data=mme,
        corruptions=("fog",),
        severities=(3,),
        max_new_tokens=3,
        max_errors=0.2,
    )
    output = tmp_path / "out"
    summary = evaluate(plan, output, console=Console(quiet=True))
    rows = json.loads((output / "results.json").read_text())["results"]
    clean = {row["metric"]: row for row in rows if row["severity"] == 0}
    assert list(clean) == ["perception", "cognition", "count", "code_reasoning"]
    assert clean["perception"]["n_items"] == 6 and clean["perception"]["n_errors"] == 2
    assert clean["cognition"]["n_items"] == 6 and clean["cognition"]["n_errors"] == 0
    assert set(summary.headline) == {"mme/none/0", "mme/fog/3"}
    assert summary.num_errors == 4  # two questions, clean and corrupted
    # The figures are those of the predictions file, scored on its own.
    score = score_files(get_task("mme"), output / "predictions" / "mme.none.0.jsonl", annotations=mme)
    assert len(score.missing) == 2
    assert score.values["cognition"] == clean["cognition"]["value"]
    assert clean["cognition"]["ci_low"] <= clean["cognition"]["value"] <= clean["cognition"]["ci_high"]
    write_report([output], tmp_path / "report")
    reported = json.loads((tmp_path / "report" / "results.json").read_text())
    assert "perception" in (tmp_path / "report" / "cells.csv").read_text()
    assert {score.metric for score in collect([load_evaluation(output)]).scores} == {"perception"}
    assert reported["results"]


def test_the_report_compares_shares_of_the_best_value(mme: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    plan = EvaluationPlan(model=str(tiny_model_folder), tasks=("mme",), data=mme, max_new_tokens=3)
    evaluate(plan, tmp_path, console=Console(quiet=True))
    path = tmp_path / "results.json"
    document = json.loads(path.read_text())
    for row in document["results"]:
        if row["metric"] == "perception":
            assert row["scale"] == 2000
            row["value"] = 500.0
    path.write_text(json.dumps(document))
    assert collect([load_evaluation(tmp_path)]).scores[0].values == {("none", 0): 0.25}


def test_a_file_of_ones_own_is_a_task(tiny_model_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (80, 90, 10)).save(tmp_path / "1.png")
    (tmp_path / "data.json").write_text('[{"id": 1, "image": "1.png", "question": "How many?", "count": 3}]')
    example = Path(__file__).resolve().parents[2] / "docs" / "examples" / "tasks" / "counting.py"
    plan = EvaluationPlan(model=str(tiny_model_folder), tasks=(str(example),), data=tmp_path / "data.json")
    summary = evaluate(plan, tmp_path / "out", console=Console(quiet=True))
    assert set(summary.headline) == {"counting/none/0"} and summary.num_errors == 0
    rows = json.loads(summary.results.read_text())["results"]
    assert [row["metric"] for row in rows] == ["accuracy", "within_one"]
