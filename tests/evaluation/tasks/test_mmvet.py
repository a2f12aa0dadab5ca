"""MM-Vet: the export, grades of several runs, capabilities, and answers nobody graded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.metrics import metric_intervals
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.files import write_json

QUESTIONS = {
    f"v1_{i}": {"imagename": f"{i}.jpg", "question": f"Q{i}?", "answer": "a<OR>b", "capability": capability}
    for i, capability in enumerate((["ocr", "math"], ["rec"], ["rec", "ocr"]))
}
JUDGE = "gpt-4-0613"


def _grade(*scores: float, content: list[str] | None = None, model: str = JUDGE) -> dict[str, Any]:
    return {"model": [model] * len(scores), "content": content or [str(s) for s in scores], "score": list(scores)}


GRADES = {"v1_0": _grade(1.0, 0.5), "v1_1": _grade(0.0, 0.0), "v1_2": _grade(0.5, 0.7)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_json(tmp_path / "mm-vet.json", QUESTIONS)
    return tmp_path / "mm-vet.json"


def test_the_total_is_the_mean_over_runs_and_an_item_counts_in_each_capability(data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "grades.json", GRADES)
    found = score_files(get_task("mmvet"), tmp_path / "grades.json", annotations=data)
    per_run = [100 * (1.0 + 0.0 + 0.5) / 3, 100 * (0.5 + 0.0 + 0.7) / 3]
    assert found.values == {
        "total": pytest.approx(sum(per_run) / 2),
        "total (judge: gpt-4-0613)": pytest.approx(sum(per_run) / 2),
        "total/math": pytest.approx(75.0),
        "total/ocr": pytest.approx(100 * (0.75 + 0.6) / 2),
        "total/rec": pytest.approx(30.0),
    }


def test_grades_alone_give_the_total(tmp_path: Path) -> None:
    write_json(tmp_path / "grades.json", {"v1_0": _grade(0.4, model="another-judge")})
    found = score_files(get_task("mmvet"), tmp_path / "grades.json")
    assert found.values == {"total": 40.0, "total (judge: another-judge)": 40.0}
    assert found.subset


def test_a_missing_grade_counts_as_wrong(data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "grades.json", {"v1_0": GRADES["v1_0"]})
    found = score_files(get_task("mmvet"), tmp_path / "grades.json", annotations=data)
    assert found.values["total"] == pytest.approx(25.0)
    assert found.missing == ["v1_1", "v1_2"]


def test_a_judge_who_gave_no_number_is_counted(data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "g.json", {**GRADES, "v1_1": _grade(0.0, 0.0, content=["I cannot", "0.0"])})
    assert score_files(get_task("mmvet"), tmp_path / "g.json", annotations=data).n_unparsed == 1


@pytest.mark.parametrize("form", ["official", "llava"])
def test_answers_nobody_graded_have_no_score_and_can_be_exported(data: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / ("p.json" if form == "official" else "p.jsonl")
    if form == "official":
        write_json(path, {"v1_1": " a "})
    else:
        path.write_text(json.dumps({"question_id": 1, "prompt": "Q1?", "text": " a "}) + "\n")
    found = score_files(get_task("mmvet"), path, annotations=data)
    assert found.export() == {"v1_0": "", "v1_1": "a", "v1_2": ""}
    assert found.values == {"total": None}, "two missing answers must not make a total of 0"
    assert metric_intervals(found.metrics, found.outcomes, seed=0, n_resamples=10) == {"total": None}


@pytest.mark.parametrize(
    ("grades", "message"),
    [
        ({"v1_0": _grade(1.5)}, "entry 'v1_0': field 'score' is"),
        ({"v1_0": {"score": ["1"]}}, "must be a list of numbers"),
        ({"v1_0": {"score": []}}, "must be a list of numbers"),
        ({"v1_0": _grade(1.0), "v1_1": _grade(1.0, 1.0)}, "different numbers of runs"),
        ({"v1_0": _grade(1.0), "v1_1": "text"}, "entry 'v1_1': is not graded, while other answers"),
        ({"v1_9": _grade(1.0)}, "'v1_9' is no question"),
    ],
)
def test_broken_grades(data: Path, tmp_path: Path, grades: dict[str, Any], message: str) -> None:
    write_json(tmp_path / "g.json", grades)
    with pytest.raises(InputError, match=message):
        score_files(get_task("mmvet"), tmp_path / "g.json", annotations=data)


def test_answers_without_annotations_are_no_grades(tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", {"v1_0": "text"})
    with pytest.raises(InputError, match="is not graded: there is no field 'score'"):
        score_files(get_task("mmvet"), tmp_path / "p.json")


def test_the_hubs_rows(tmp_path: Path) -> None:
    import datasets

    row = {"question_id": "v1_0", "image": {"bytes": b"x"}, "question": "Q?", "answer": "a", "capability": "ocr,math"}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    (item,) = get_task("mmvet").load(tmp_path, None, tmp_path, 0)
    assert (item.id, item.question, item.meta["capabilities"]) == ("v1_0", "Q?", ("ocr", "math"))
