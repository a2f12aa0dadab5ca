"""ChartQA: every vector of the rule, both halves and their mean, and the ways answers name their question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.metrics import metric_intervals
from symphony_vlm.evaluation.scoring import Score, score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.evaluation.tasks.chartqa import is_right
from symphony_vlm.files import write_json

SHORT = "\nAnswer the question using a single word or phrase."
HUMAN = [
    {"imgname": "1.png", "query": "How many?", "label": "14"},
    {"imgname": "2.png", "query": "How many?", "label": "Yes"},
    {"imgname": "2.png", "query": "Which year?", "label": "2011"},
]
AUGMENTED = [{"imgname": "a1.png", "query": "What share?", "label": "0.1"}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_json(tmp_path / "test/test_human.json", HUMAN)
    write_json(tmp_path / "test/test_augmented.json", AUGMENTED)
    return tmp_path / "test"


def _scored(path: Path, rows: list[dict[str, Any]], data: Path, questions: Path | None = None) -> Score:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return score_files(get_task("chartqa"), path, annotations=data, questions=questions)


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("10%", "0.1", True),
        ("14.", "14", True),
        ("105", "100", True),
        ("2010", "2011", True),
        ("YES", "Yes", True),
        ("95", "100", True),
        ("-5%", "-0.05", True),
        ("10", "10%", False),
        ("0.0", "0", False),
        ("0", "0", True),
        ("1,000", "1000", False),
        ("$5", "5", False),
        ("106", "100", False),
        ("Yes.", "Yes", False),
        ("nan", "5", False),
    ],
)
def test_vectors_of_the_rule(prediction: str, target: str, right: bool) -> None:
    assert is_right(prediction, target) is right


def test_human_augmented_and_their_mean(data: Path, tmp_path: Path) -> None:
    rows = [
        {"question_id": "augmented-0", "text": "10%"},
        {"question_id": "human-2", "text": "2010"},
        {"question_id": "human-0", "text": "15"},
    ]
    found = _scored(tmp_path / "p.jsonl", rows, data)
    assert found.values == {
        "relaxed_accuracy": pytest.approx((1 / 3 + 1) / 2),
        "accuracy_strict": 0.0,
        "relaxed_accuracy/human": pytest.approx(1 / 3),
        "accuracy_strict/human": 0.0,
        "relaxed_accuracy/augmented": 1.0,
        "accuracy_strict/augmented": 0.0,
    }
    assert found.missing == ["human-1"]
    headline = metric_intervals([found.metrics[0]], found.outcomes, seed=0, n_resamples=100)["relaxed_accuracy"]
    assert headline is not None
    assert headline.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "rows",
    [
        [{"imgname": "2.png", "query": "How many?", "prediction": "yes"}],
        [{"image": "2", "question": f"how many?{SHORT}", "text": "yes"}],
        [{"question_id": "2.png", "prompt": f"How many?{SHORT}", "text": "yes"}],
        [{"question_id": 1, "text": "yes"}],
    ],
)
def test_answers_name_their_question_by_picture_and_text_or_by_place(
    data: Path, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    found = _scored(tmp_path / "p.jsonl", rows, data / "test_human.json")
    assert [outcome.prediction for outcome in found.outcomes] == [None, "yes", None]
    assert found.values["relaxed_accuracy"] == pytest.approx(1 / 3)


def test_llavas_question_file_says_what_the_numbers_mean(data: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question_id": 77, "image": "a1.png", "text": f"What share?{SHORT}"}) + "\n")
    found = _scored(tmp_path / "p.jsonl", [{"question_id": 77, "prompt": "x", "text": "0.1"}], data, questions)
    assert found.values["relaxed_accuracy/augmented"] == 1.0


def test_a_place_is_ambiguous_over_two_files(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'1' is no question of the benchmark"):
        _scored(tmp_path / "p.jsonl", [{"question_id": 1, "text": "yes"}], data)


def test_a_second_answer_is_an_error(data: Path, tmp_path: Path) -> None:
    rows = [{"question_id": "human-0", "text": "1"}, {"imgname": "1.png", "query": "How many?", "text": "2"}]
    with pytest.raises(InputError, match=r"p.jsonl: line 2: a second answer to '1', 'how many\?'"):
        _scored(tmp_path / "p.jsonl", rows, data)


def test_prompts_and_pictures(data: Path) -> None:
    (data / "png").mkdir()
    items = get_task("chartqa").load(data, None, data, 0)
    assert items[0].question == f"How many?{SHORT}"
    assert items[0].images[0].path == data / "png/1.png"
    single = get_task("chartqa_single_word").load(data, None, data, 0)
    assert single[0].question == "How many?\nAnswer the question with a single word."


def test_the_hubs_rows(tmp_path: Path) -> None:
    import datasets

    rows = [
        {"type": "human_test", "question": "Q?", "answer": ["14"], "image": {"bytes": b"x", "path": None}},
        {"type": "augmented_test", "question": "Q?", "answer": ["3"], "image": {"bytes": b"y", "path": None}},
    ]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    items = get_task("chartqa").load(tmp_path, None, tmp_path, 0)
    assert [(item.id, item.group, item.answers) for item in items] == [
        ("human-0", "human", ("14",)),
        ("augmented-1", "augmented", ("3",)),
    ]
