"""VizWiz: the photo is the key, equal answers are left out one by one, the unanswerable class has an F1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.files import write_json


def _record(number: int, answers: list[str], kind: str) -> dict[str, Any]:
    return {
        "image": f"VizWiz_val_{number:08d}.jpg",
        "question": "What is it?",
        "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
        "answer_type": kind,
        "answerable": int(kind != "unanswerable"),
    }


RECORDS = [
    _record(0, ["dog"] * 3 + [f"x{i}" for i in range(7)], "other"),
    _record(1, ["unanswerable"] * 10, "unanswerable"),
    _record(2, ["unanswerable"] * 6 + ["cup"] * 4, "unanswerable"),
    _record(3, ["red"] * 10, "other"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_json(tmp_path / "val.json", RECORDS)
    return tmp_path / "val.json"


def _results(path: Path, *answers: tuple[str, str]) -> Path:
    write_json(path, [{"image": image, "answer": answer} for image, answer in answers])
    return path


def test_figures(data: Path, tmp_path: Path) -> None:
    names = [record["image"] for record in RECORDS]
    answers = ("Dog", "Unanswerable.", "cup", "unanswerable")
    path = _results(tmp_path / "r.json", *zip(names, answers, strict=True))
    found = score_files(get_task("vizwiz"), path, annotations=data)
    # Three equal answers without ids: comparing entries would leave out all three at once and give 0.7.
    assert [outcome.scored.score for outcome in found.outcomes] == [0.9, 1.0, 1.0, 0.0]
    assert found.values["accuracy"] == pytest.approx(2.9 / 4)
    assert found.values["accuracy/other"] == pytest.approx(0.45)
    assert found.values["accuracy/unanswerable"] == 1.0
    # Said of 1 and 3, true of 1 and 2.
    assert found.values["f1_unanswerable"] == pytest.approx(2 * 1 / (2 + 2))


def test_the_prompt(data: Path) -> None:
    item = get_task("vizwiz").load(data, None, data.parent, 0)[0]
    assert item.question == (
        "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )
    assert item.images[0].path == data.parent / "VizWiz_val_00000000.jpg"


def test_llavas_numbers_need_the_question_file(data: Path, tmp_path: Path) -> None:
    answers, questions = tmp_path / "a.jsonl", tmp_path / "q.jsonl"
    answers.write_text(json.dumps({"question_id": 17, "prompt": "x", "text": "dog"}) + "\n")
    questions.write_text(json.dumps({"question_id": 17, "image": RECORDS[0]["image"], "text": "What is it?"}) + "\n")
    found = score_files(get_task("vizwiz"), answers, annotations=data, questions=questions)
    assert found.outcomes[0].scored.score == 0.9
    with pytest.raises(InputError, match=r"'17.jpg' is no question"):
        score_files(get_task("vizwiz"), answers, annotations=data)


def test_test_answers_are_not_public(tmp_path: Path) -> None:
    data = tmp_path / "test.json"
    write_json(
        data, [{"image": "VizWiz_test_1.jpg", "question": "Q?"}, {"image": "VizWiz_test_2.jpg", "question": "Q"}]
    )
    path = _results(tmp_path / "r.json", ("VizWiz_test_2.jpg", "The Dogs, two"))
    found = score_files(get_task("vizwiz"), path, annotations=data)
    assert found.export() == [
        {"image": "VizWiz_test_1.jpg", "answer": ""},
        {"image": "VizWiz_test_2.jpg", "answer": "dogs 2"},
    ]
    assert found.values == {"accuracy": None, "f1_unanswerable": None}


def test_a_photo_that_stands_twice(tmp_path: Path) -> None:
    write_json(tmp_path / "val.json", [RECORDS[0], RECORDS[0]])
    with pytest.raises(InputError, match="'VizWiz_val_00000000.jpg' stands twice"):
        get_task("vizwiz").load(tmp_path / "val.json", None, tmp_path, 0)


def test_the_hubs_rows(tmp_path: Path) -> None:
    import datasets

    rows = [
        {
            "question_id": record["image"].removesuffix(".jpg"),
            "image": {"bytes": b"x", "path": None},
            "question": record["question"],
            "answers": [answer["answer"] for answer in record["answers"]],
            "category": record["answer_type"],
        }
        for record in RECORDS
    ]
    (tmp_path / "hub/data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub/data/val-00000-of-00001.parquet")
    items = get_task("vizwiz").load(tmp_path / "hub", None, tmp_path, 0)
    assert [item.id for item in items] == [record["image"] for record in RECORDS]
    assert [item.meta["unanswerable"] for item in items] == [False, True, True, False]
    assert items[0].images[0].data == b"x"
