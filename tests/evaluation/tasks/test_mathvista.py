"""MathVista: extraction without a judge, normalisation, imported extractions and the export."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.rules.mathvista import edit_distance, normalize_extraction, quick_extraction
from symphony_vlm.evaluation.scoring import score_files
from symphony_vlm.evaluation.task import get_task
from symphony_vlm.files import write_json

CHOICES = ["12 cm", "145", "Yes"]


def _problem(pid: int, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "pid": str(pid),
        "question": "How long?",
        "image": f"images/{pid}.jpg",
        "choices": None,
        "unit": None,
        "precision": None,
        "answer": answer,
        "question_type": "free_form",
        "answer_type": "integer",
        "metadata": {"task": "geometry", "skills": ["arithmetic", "logic"], "split": "testmini"},
        **more,
    }


PROBLEMS = {
    "1": _problem(1, "12 cm", question_type="multi_choice", answer_type="text", choices=CHOICES),
    "2": _problem(2, "7"),
    "3": _problem(3, "1.2", answer_type="float", precision=1.0, unit="m"),
    "4": _problem(4, "[1, 2]", answer_type="list", metadata={"task": "tables", "skills": ["logic"]}),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_json(tmp_path / "testmini.json", PROBLEMS)
    return tmp_path / "testmini.json"


@pytest.mark.parametrize(
    ("response", "question_type", "answer_type", "found"),
    [
        ("", "free_form", "integer", ""),
        ("145", "multi_choice", "text", "145"),
        ("B", "multi_choice", "text", None),
        ("7", "free_form", "integer", "7"),
        ("7.5", "free_form", "integer", None),
        ("7.50", "free_form", "float", "7.5"),
        ('So. The answer is "(B)". Bye', "multi_choice", "text", "(B)"),
        ("The answer is 7.", "free_form", "integer", None),
    ],
)
def test_extraction_without_a_judge(response: str, question_type: str, answer_type: str, found: str | None) -> None:
    assert quick_extraction(response, CHOICES, question_type, answer_type) == found


@pytest.mark.parametrize(
    ("extraction", "expected"),
    [
        ("(b) 12 cm", "145"),
        (" A ", "12 cm"),
        ("a", "145"),
        ("D", "145"),
        ("", "145"),
        ("yes", "Yes"),
        ("12", "145"),
        (145, "145"),
    ],
)
def test_a_choice_is_always_found(extraction: object, expected: str) -> None:
    """A bare ``a`` is no letter, but the nearest choice: 3 replacements to 145, 3 to Yes; the first wins."""
    assert normalize_extraction(extraction, CHOICES, "multi_choice", "text", None) == expected


@pytest.mark.parametrize(
    ("extraction", "answer_type", "precision", "expected"),
    [
        ("7.9", "integer", None, "7"),
        (7, "integer", None, "7"),
        ("seven", "integer", None, None),
        ("inf", "integer", None, None),
        (None, "integer", None, None),
        ("1.25", "float", 1, "1.2"),
        ("1.25", "float", 1.0, "1.2"),
        ("1", "float", 2, "1.0"),
        ("x", "float", 2, None),
        ([1, 2], "list", None, "[1, 2]"),
        ("as it is ", "text", None, "as it is "),
    ],
)
def test_numbers_and_lists(extraction: object, answer_type: str, precision: float | None, expected: str | None) -> None:
    assert normalize_extraction(extraction, (), "free_form", answer_type, precision) == expected


@pytest.mark.parametrize(("a", "b"), [("", "abc"), ("kitten", "sitting"), ("flaw", "lawn"), ("ab", "ba"), ("x", "x")])
def test_edit_distance_is_the_recursive_definition(a: str, b: str) -> None:
    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert edit_distance(a, b) == distance(len(a), len(b))


def test_without_a_judge(data: Path, tmp_path: Path) -> None:
    lines = [(1, "(A) perhaps"), (2, "7"), (3, 'The answer is "1.24".'), (4, "")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"question_id": i, "prompt": "p", "text": t}) + "\n" for i, t in lines))
    found = score_files(get_task("mathvista"), path, annotations=data)
    assert [outcome.scored.score for outcome in found.outcomes] == [0.0, 1.0, 1.0, 0.0]
    assert [outcome.scored.status for outcome in found.outcomes] == ["unparsed", "ok", "ok", "empty"]
    assert found.values["accuracy"] == 0.5
    assert found.n_unparsed == 2


@pytest.mark.parametrize("with_annotations", [True, False])
def test_a_judges_extractions_and_what_comes_from_nothing(data: Path, tmp_path: Path, with_annotations: bool) -> None:
    nearest_to_nothing = {**PROBLEMS["1"], "answer": "145"}
    judged = {
        "1": {**nearest_to_nothing, "response": "long talk", "extraction": ""},
        "2": {**PROBLEMS["2"], "response": "seven", "extraction": "7"},
        "3": {**PROBLEMS["3"], "response": "r", "extraction": "none"},
        "4": {**PROBLEMS["4"], "response": "r", "extraction": [1, 2]},
    }
    write_json(data, {**PROBLEMS, "1": nearest_to_nothing})
    write_json(tmp_path / "judged.json", judged)
    found = score_files(get_task("mathvista"), tmp_path / "judged.json", annotations=data if with_annotations else None)
    assert [outcome.scored.score for outcome in found.outcomes] == [1.0, 1.0, 0.0, 1.0]
    assert found.values == {
        "accuracy": 0.75,
        "accuracy_ignore_empty": 0.5,
        "accuracy/question_type/free_form": pytest.approx(2 / 3),
        "accuracy/question_type/multi_choice": 1.0,
        "accuracy/answer_type/float": 0.0,
        "accuracy/answer_type/integer": 1.0,
        "accuracy/answer_type/list": 1.0,
        "accuracy/answer_type/text": 1.0,
        "accuracy/task/geometry": pytest.approx(2 / 3),
        "accuracy/task/tables": 1.0,
        "accuracy/skills/arithmetic": pytest.approx(2 / 3),
        "accuracy/skills/logic": 0.75,
    }


def test_the_export_is_what_the_judges_script_reads_and_comes_back(data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", {"1": " I think B ", "2": "7"})
    found = score_files(get_task("mathvista"), tmp_path / "p.json", annotations=data)
    exported: Any = found.export()
    assert exported["1"]["response"] == "I think B"
    assert exported["3"]["response"] == ""
    assert {name: exported["1"][name] for name in ("pid", "question", "choices", "answer", "precision")} == {
        "pid": "1",
        "question": "How long?",
        "choices": CHOICES,
        "answer": "12 cm",
        "precision": None,
    }
    exported["1"]["extraction"] = "A"
    write_json(tmp_path / "judged.json", exported)
    again = score_files(get_task("mathvista"), tmp_path / "judged.json")
    assert [outcome.scored.score for outcome in again.outcomes] == [1.0, 1.0, 0.0, 0.0]


def test_the_authors_query(data: Path) -> None:
    items = get_task("mathvista").load(data, None, data.parent, 0)
    assert items[0].question == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: How long?\nChoices:\n(A) 12 cm\n(B) 145\n(C) Yes"
    )
    assert items[2].question == (
        "Hint: Please answer the question requiring a floating-point number with one decimal place and provide the "
        "final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How long? (Unit: m)"
    )
    assert items[0].images[0].path == data.parent / "images/1.jpg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_type": None}, "field 'question_type' is missing"),
        ({"question_type": "multi_choice", "choices": []}, "a multi_choice question has no choices"),
    ],
)
def test_broken_problems(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_json(tmp_path / "t.json", {"5": {**_problem(5, "1"), **change}})
    with pytest.raises(InputError, match=f"entry '5': {message}"):
        get_task("mathvista").load(tmp_path / "t.json", None, tmp_path, 0)
