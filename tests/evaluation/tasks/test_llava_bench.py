"""LLaVA-Bench: a ratio of means, failed parses left out and counted, and what a judge has to see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.metrics import metric_intervals
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _review(question_id: int, category: str, scores: list[float] | None, content: str = "") -> dict[str, Any]:
    row = {"id": question_id + 1, "question_id": question_id, "category": f"llava_bench_{category}"}
    return {**row, "content": content, **({"tuple": scores} if scores is not None else {})}


REVIEWS = [
    _review(0, "conv", [10, 5]),
    _review(1, "conv", [-1, -1], "Failed to Get a Proper Review."),
    _review(2, "detail", [8, 7]),
    _review(3, "complex", None, "9, 6\nBecause."),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "bench"
    folder.mkdir()
    categories = ("conv", "conv", "detail", "complex")
    questions = [
        {"question_id": i, "image": "001.jpg", "category": c, "text": f"Q{i}?"} for i, c in enumerate(categories)
    ]
    _lines(folder / "questions.jsonl", questions)
    _lines(folder / "answers_gpt4.jsonl", [{"question_id": i, "text": f"R{i}"} for i in range(4)])
    _lines(folder / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": ["a lake", "trees"]}])
    return folder


@pytest.mark.parametrize("with_annotations", [True, False])
def test_relative_scores_leave_failed_parses_out_and_count_them(
    data: Path, tmp_path: Path, with_annotations: bool
) -> None:
    path = _lines(tmp_path / "reviews.jsonl", REVIEWS)
    found = score_files(get_task("llava_bench"), path, annotations=data if with_annotations else None)
    assert found.values == {
        "relative_score": pytest.approx(100 * (5 + 7 + 6) / (10 + 8 + 9)),
        "relative_score/complex": pytest.approx(100 * 6 / 9),
        "relative_score/conv": pytest.approx(50.0),
        "relative_score/detail": pytest.approx(87.5),
    }
    assert found.n_unparsed == 1
    intervals = metric_intervals(found.metrics, found.outcomes, seed=0, n_resamples=50)
    assert intervals["relative_score"] is not None


def test_a_category_of_failed_reviews_has_no_score(tmp_path: Path) -> None:
    found = score_files(get_task("llava_bench"), _lines(tmp_path / "r.jsonl", REVIEWS[1:3]))
    assert found.values["relative_score/conv"] is None
    assert found.values["relative_score"] == 87.5


@pytest.mark.parametrize(
    ("content", "scores"),
    [("8 9\n...", (8.0, 9.0)), ("8.5, 9", (8.5, 9.0)), ("8", None), ("good", None), ("8 9 1", None), ("80 90", None)],
)
def test_the_first_line_of_a_review(tmp_path: Path, content: str, scores: tuple[float, float] | None) -> None:
    found = score_files(get_task("llava_bench"), _lines(tmp_path / "r.jsonl", [_review(0, "conv", None, content)]))
    assert found.outcomes[0].item.meta["review"] == scores


def test_answers_nobody_judged_have_no_score_and_can_be_exported(data: Path, tmp_path: Path) -> None:
    path = _lines(tmp_path / "a.jsonl", [{"question_id": 2, "prompt": "Q2?", "text": " mine "}])
    found = score_files(get_task("llava_bench"), path, annotations=data)
    exported: Any = found.export()
    assert exported[2] == {
        "question_id": "2",
        "category": "detail",
        "context": "a lake\ntrees",
        "question": "Q2?",
        "reference": "R2",
        "text": "mine",
    }
    assert exported[0]["text"] == ""
    assert set(found.values.values()) == {None}


def test_what_is_no_review(data: Path, tmp_path: Path) -> None:
    path = _lines(tmp_path / "a.jsonl", [{"question_id": 2, "text": "mine"}])
    with pytest.raises(InputError, match="line 1: is no review"):
        score_files(get_task("llava_bench"), path)
    twice = _lines(tmp_path / "r.jsonl", [REVIEWS[0], REVIEWS[0]])
    with pytest.raises(InputError, match="'0' stands twice"):
        score_files(get_task("llava_bench"), twice)
    with pytest.raises(InputError, match="a second answer to '0'"):
        score_files(get_task("llava_bench"), twice, annotations=data)


def test_the_hubs_rows(tmp_path: Path) -> None:
    import datasets

    row = {
        "question_id": 3,
        "question": "Q?",
        "caption": "a lake",
        "gpt_answer": "R",
        "category": "conv",
        "image": {"bytes": b"x"},
        "image_id": "001.jpg",
    }
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    (item,) = get_task("llava_bench").load(tmp_path, None, tmp_path, 0)
    assert (item.id, item.question, item.answers, item.meta["context"]) == ("3", "Q?", ("R",), "a lake")
