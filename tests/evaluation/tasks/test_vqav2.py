"""VQAv2: normalised only where answers differ, figures to two decimals, the server's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.files import write_json


def _annotation(question_id: int, answers: list[str], answer_type: str, question_type: str) -> dict[str, Any]:
    entries = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, start=1)]
    return {
        "question_id": question_id,
        "image_id": 262148,
        "question_type": question_type,
        "answer_type": answer_type,
        "answers": entries,
    }


ANNOTATIONS = [
    _annotation(1, ["yes"] * 10, "yes/no", "is the"),
    _annotation(2, ["yes"] * 9 + ["no"], "yes/no", "is the"),
    _annotation(3, ["2"] * 2 + ["two"] + [f"x{i}" for i in range(7)], "number", "how many"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "vqa"
    questions = [{"question_id": i, "image_id": 262148, "question": f"Q{i}?"} for i in (1, 2, 3)]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": ANNOTATIONS})
    return folder


def _results(path: Path, *answers: tuple[int, str]) -> Path:
    write_json(path, [{"question_id": question_id, "answer": answer} for question_id, answer in answers])
    return path


def test_questions_and_annotations_join(data: Path) -> None:
    items = get_task("vqav2").load(data, Path("pictures"), data, 0)
    assert items[0].question == "Q1?\nAnswer the question using a single word or phrase."
    assert items[0].images[0].path == Path("pictures/COCO_val2014_000000262148.jpg")
    assert items[2].answers[:3] == ("2", "2", "two")


def test_against_ten_equal_answers_nothing_is_normalised(data: Path, tmp_path: Path) -> None:
    found = score_files(
        get_task("vqav2"), _results(tmp_path / "r.json", (1, "Yes"), (2, "Yes."), (3, "2")), annotations=data
    )
    assert [outcome.scored.score for outcome in found.outcomes] == [0.0, 1.0, 0.9]
    assert [outcome.scored.lenient for outcome in found.outcomes] == [1.0, 1.0, 0.9]
    assert found.values == {
        "accuracy": 63.33,
        "accuracy_lenient": 96.67,
        "accuracy/answer_type/number": 90.0,
        "accuracy/answer_type/yes/no": 50.0,
        "accuracy/question_type/how many": 90.0,
        "accuracy/question_type/is the": 50.0,
    }


def test_newlines_and_tabs_go_even_where_nothing_else_does(data: Path, tmp_path: Path) -> None:
    found = score_files(get_task("vqav2"), _results(tmp_path / "r.json", (1, "\tyes\n")), annotations=data)
    assert found.outcomes[0].scored.score == 1.0
    assert found.missing == ["2", "3"]
    assert found.values["accuracy"] == 33.33


def test_annotations_alone_are_enough_to_score(data: Path, tmp_path: Path) -> None:
    file = data / "v2_mscoco_val2014_annotations.json"
    lines = tmp_path / "answers.jsonl"
    lines.write_text(json.dumps({"question_id": 2, "prompt": "x", "text": "no"}) + "\n")
    assert score_files(get_task("vqav2"), lines, annotations=file).outcomes[1].scored.score == 0.3


def test_a_split_without_answers_is_exported_and_has_no_score(data: Path, tmp_path: Path) -> None:
    questions = tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json"
    rows = [{"question_id": i, "image_id": 9, "question": "Q?"} for i in (11, 12)]
    write_json(questions, {"questions": rows})
    assert get_task("vqav2").load(questions, None, data, 0)[0].images[0].name == "COCO_test2015_000000000009.jpg"
    found = score_files(get_task("vqav2"), _results(tmp_path / "r.json", (11, "The Two dogs.")), annotations=questions)
    assert found.export() == [{"question_id": 11, "answer": "2 dogs"}, {"question_id": 12, "answer": ""}]
    assert found.values == {"accuracy": None, "accuracy_lenient": None}
    assert any("no value: accuracy" in warning for warning in found.warnings)


def test_llavas_question_lines_can_be_asked(tmp_path: Path) -> None:
    path = tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl"
    path.write_text(json.dumps({"question_id": 7, "image": "COCO_a.jpg", "text": "Q?\nA.", "category": "d"}) + "\n")
    (item,) = get_task("vqav2").load(path, None, tmp_path, 0)
    assert (item.question, item.images[0].path) == ("Q?\nA.", tmp_path / "COCO_a.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "has no annotation"),
        ("more", "3 annotations for 2 questions"),
        ("twice", "a second annotation of the question 1"),
    ],
)
def test_questions_and_annotations_of_different_splits(data: Path, change: str, message: str) -> None:
    questions = data / "v2_OpenEnded_mscoco_val2014_questions.json"
    annotations = data / "v2_mscoco_val2014_annotations.json"
    if change == "missing":
        write_json(annotations, {"annotations": ANNOTATIONS[:2]})
    elif change == "more":
        kept = json.loads(questions.read_text())["questions"][:2]
        write_json(questions, {"questions": kept})
    else:
        write_json(annotations, {"annotations": [*ANNOTATIONS, ANNOTATIONS[0]]})
    with pytest.raises(InputError, match=message):
        get_task("vqav2").load(data, None, data, 0)


def test_a_second_answer_and_an_answer_to_nothing_are_errors(data: Path, tmp_path: Path) -> None:
    for answers, message in [(((1, "a"), (1, "b")), "a second answer to '1'"), (((99, "a"),), "'99' is no question")]:
        with pytest.raises(InputError, match=message):
            score_files(get_task("vqav2"), _results(tmp_path / "r.json", *answers), annotations=data)


def test_the_hubs_rows(tmp_path: Path) -> None:
    import datasets

    rows = [{**row, "question": "Q?", "image": {"bytes": b"x", "path": None}} for row in ANNOTATIONS]
    (tmp_path / "hub/data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub/data/validation-00000-of-00001.parquet")
    item = get_task("vqav2").load(tmp_path / "hub", None, tmp_path, 0)[2]
    assert (item.id, item.answers[2], item.group, item.images[0].data) == ("3", "two", "number", b"x")
