"""OCRBench: containment, formulas, and figures that are counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import EvaluationItem, get_task
from symphony_vlm.evaluation.tasks.ocrbench import score
from symphony_vlm.files import write_json


def _record(number: int, answers: Any, kind: str = "Doc-oriented VQA", dataset: str = "docVQA") -> dict[str, Any]:
    return {
        "id": number,
        "dataset_name": dataset,
        "image_path": f"docVQA/{number}.png",
        "question": "What? ",
        "answers": answers,
        "type": kind,
    }


RECORDS = [
    _record(0, "CENTRE"),
    _record(1, ["5", "five"], "Regular Text Recognition"),
    _record(2, "a ^ { 2 }", "Handwritten Mathematical Expression Recognition", "HME100k"),
    _record(3, ["x"]),
]


@pytest.mark.parametrize(
    ("prediction", "answers", "dataset", "right"),
    [
        ("The word is Centre.", ["CENTRE"], "docVQA", True),
        ("cen tre", ["centre"], "docVQA", False),
        ("new\nyork", ["New York"], "docVQA", True),
        ("1950", ["5"], "docVQA", True),
        ("two", ["1", "Two "], "docVQA", True),
        ("a^{2}", ["a ^ { 2 }"], "HME100k", True),
        ("A^{2}", ["a ^ { 2 }"], "HME100k", False),
        ("", ["a"], "docVQA", False),
    ],
)
def test_the_rule(prediction: str, answers: list[str], dataset: str, right: bool) -> None:
    item = EvaluationItem(id="1", question="?", answers=tuple(answers), meta={"dataset": dataset})
    assert score(prediction, item).score == float(right)


@pytest.mark.parametrize("with_annotations", [True, False])
def test_counts_in_all_and_per_type(tmp_path: Path, with_annotations: bool) -> None:
    """The authors' result file holds the truth; scoring it twice counts once each time."""
    write_json(tmp_path / "OCRBench.json", RECORDS)
    said = ["centre", "fifty", "a^{2}", "y"]
    write_json(tmp_path / "r.json", [{**r, "predict": text} for r, text in zip(RECORDS, said, strict=True)])
    annotations = tmp_path / "OCRBench.json" if with_annotations else None
    for _ in range(2):
        found = score_files(get_task("ocrbench"), tmp_path / "r.json", annotations=annotations)
        assert found.values == {
            "score": 2.0,
            "accuracy": 0.5,
            "score/Doc-oriented VQA": 1.0,
            "score/Handwritten Mathematical Expression Recognition": 1.0,
            "score/Regular Text Recognition": 0.0,
        }
    assert found.metrics[0].scale == 4
    assert found.subset


def test_prompt_and_pictures(tmp_path: Path) -> None:
    write_json(tmp_path / "OCRBench.json", RECORDS)
    item = get_task("ocrbench").load(tmp_path / "OCRBench.json", tmp_path / "pictures", tmp_path, 0)[1]
    assert (item.question, item.images[0].path) == ("What?", tmp_path / "pictures/docVQA/1.png")


def test_faults(tmp_path: Path) -> None:
    write_json(tmp_path / "OCRBench.json", RECORDS)
    for rows, message in [
        ([{"id": 0}], "no answer: none of the fields predict"),
        ([{"id": 9, "predict": "a"}], "'9' is no question"),
        ([{"id": 1, "predict": "a"}] * 2, "a second answer to '1'"),
    ]:
        write_json(tmp_path / "r.json", rows)
        with pytest.raises(InputError, match=message):
            score_files(get_task("ocrbench"), tmp_path / "r.json", annotations=tmp_path / "OCRBench.json")


def test_the_hubs_rows(tmp_path: Path) -> None:
    import datasets

    row = {"dataset": "HME100k", "question": "Q", "question_type": "T", "answer": ["a b"], "image": {"bytes": b"x"}}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list([row, row]).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    items = get_task("ocrbench").load(tmp_path, None, tmp_path, 0)
    assert [(item.id, item.group, item.answers, item.meta["dataset"]) for item in items] == [
        ("0", "T", ("a b",), "HME100k"),
        ("1", "T", ("a b",), "HME100k"),
    ]
