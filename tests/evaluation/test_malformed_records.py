"""Every field of every format spoilt in every way: a clear error that names the file, or a score; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task

MISSING = object()
SPOILT: list[Any] = [
    MISSING,
    None,
    True,
    -1,
    2.5,
    float("nan"),
    float("inf"),
    10**400,
    "",
    " ",
    "\u00b2",
    "9" * 5000,
    "[" * 5000,
    "A" * 300,
    [],
    [1, None],
    {},
    {"bytes": 5},
]

PICTURE = {"image": "1.png"}
VALID: dict[str, dict[str, Any]] = {
    "pope": {"question_id": 1, "text": "Is there a cat?", "label": "yes", **PICTURE},
    "mmbench": {
        "index": 1,
        "question": "Which?",
        "hint": "x",
        "A": "a",
        "B": "b",
        "answer": "A",
        "category": "c",
        **PICTURE,
    },
    "scienceqa": {"id": "1", "question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "x", **PICTURE},
    "mmmu": {
        "id": "validation_Art_1",
        "question": "Which?",
        "question_type": "multiple-choice",
        "options": "['a', 'b']",
        "answer": "A",
        "image_1": "1.png",
    },
    "mmstar": {
        "index": 0,
        "question": "Which? A: a, B: b",
        "answer": "A",
        "category": "c",
        "l2_category": "d",
        **PICTURE,
    },
    "seedbench": {
        "question_id": 1,
        "question": "Which?",
        "answer": "A",
        "question_type_id": 1,
        "data_id": "x",
        **{f"choice_{letter}": letter for letter in "abcd"},
    },
    "ai2d": {"id": 1, "question": "Which?", "options": ["a", "b"], "answer": "1", "mask": True, **PICTURE},
    "realworldqa": {"id": 1, "question": "Which? A. a B. b", "answer": "A", **PICTURE},
    "hallusionbench": {
        "category": "VD",
        "subcategory": "x",
        "set_id": "1",
        "figure_id": "1",
        "question_id": "1",
        "visual_input": "1",
        "question": "Is it?",
        "gt_answer": "1",
        "filename": "1.png",
    },
    "multiple_choice": {"id": 1, "question": "Which?", "choices": ["a", "b"], "answer": "A", **PICTURE},
}
IDS = {
    "pope": "1/Is there a cat?",
    "mmstar": "0",
    "mmmu": "validation_Art_1",
    "hallusionbench": "VD/x/1/1/1",
}


def spoilt(record: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for field in record:
        for value in SPOILT:
            changed = {name: old for name, old in record.items() if name != field}
            yield field, value, changed if value is MISSING else {**changed, field: value}


def write(path: Path, record: dict[str, Any]) -> Path:
    path.write_text(json.dumps(record) + "\n")
    return path


@pytest.mark.parametrize("name", VALID)
def test_the_unspoilt_record_scores(name: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", VALID[name])
    answers = write(tmp_path / "answers.jsonl", {"item_id": IDS.get(name, "1"), "prediction": "A"})
    assert len(score_files(get_task(name), answers, annotations=data).outcomes) == 1


@pytest.mark.parametrize("name", VALID)
def test_a_spoilt_annotation_is_a_clear_error_or_harmless(name: str, tmp_path: Path) -> None:
    task, errors = get_task(name), 0
    for field, value, record in spoilt(VALID[name]):
        data = write(tmp_path / "data.jsonl", record)
        try:
            items = task.load(data, tmp_path, tmp_path, 0)
            assert all(isinstance(item.question, str) and isinstance(item.answers[0], str) for item in items)
            # Whatever was loaded can be scored.
            for item in items:
                task.score("A", item)
        except InputError as error:
            errors += 1
            assert "data.jsonl" in str(error), (field, value)
            assert len(str(error)) < 2000, (field, value)
    assert errors >= 20


@pytest.mark.parametrize("name", VALID)
def test_a_spoilt_answer_is_a_clear_error_or_a_score(name: str, tmp_path: Path) -> None:
    data, task = write(tmp_path / "data.jsonl", VALID[name]), get_task(name)
    own = {"item_id": IDS.get(name, "1"), "prediction": "A"}
    llava = {"question_id": "1", "prompt": VALID[name].get("text", "Which?"), "text": "A"}
    for line in (own, llava):
        for field, value, record in spoilt(line):
            answers = write(tmp_path / "answers.jsonl", record)
            try:
                score_files(task, answers, annotations=data)
            except InputError as error:
                assert "answers.jsonl" in str(error), (field, value)


def test_there_are_more_than_a_thousand() -> None:
    assert sum(len(list(spoilt(record))) for record in VALID.values()) + 10 * 5 * len(SPOILT) > 1000
