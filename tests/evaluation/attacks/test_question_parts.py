"""What of a prompt is the question: by the prompts that the built-in tasks write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from symphony_vlm.evaluation.attacks.question_parts import question_span
from symphony_vlm.evaluation.attacks.question_swap import QuestionSwap
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.rules.letters import LETTER_INSTRUCTION, split_options
from symphony_vlm.evaluation.rules.yes_no import SHORT_INSTRUCTION
from symphony_vlm.evaluation.task import get_task

QUESTION = "Which colour has the largest circle?"


def _item(question: str, **more: object) -> EvaluationItem:
    return EvaluationItem(id="q", question=question, answers=("A",), image_key="k", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "item",
    [
        _item(QUESTION),
        _item(QUESTION + SHORT_INSTRUCTION),
        _item(f"{QUESTION}\nReference OCR token: circle, largest{SHORT_INSTRUCTION}"),
        _item(f"{QUESTION}\nA. red circle\nB. blue circle{LETTER_INSTRUCTION}", choices=("red circle", "blue circle")),
        _item(f"{QUESTION}\n(A) red\n(B) blue\n{LETTER_INSTRUCTION}", choices=("red", "blue")),
        _item(f"{QUESTION}\nOptions: A: red, B: blue{LETTER_INSTRUCTION}", choices=("red", "blue")),
        _item(f"{QUESTION}\nAnswer the question with a single word."),
        _item(f"{QUESTION}\nWhen the provided information is insufficient, respond.{SHORT_INSTRUCTION}"),
        _item(
            f"Which hint?\n{QUESTION}\nA. red\nB. blue\n请直接回答选项字母。", choices=("red", "blue"), asked=QUESTION
        ),
        _item(f"Hint: Please answer.\nQuestion: {QUESTION} (Unit: cm)\nChoices:\n(A) red", asked=QUESTION),
        _item(f"{QUESTION}\nPlease answer directly with only the letter of the correct option."),
        _item(f"{QUESTION} Please answer yes or no."),
    ],
    ids=lambda item: item.question[len(QUESTION) :][:30],
)
def test_the_question_ends_before_options_tokens_and_instruction(item: EvaluationItem) -> None:
    start, end = question_span(item)
    assert item.question[start:end] == QUESTION
    swapped = QuestionSwap(rate=1.0).pose(item, (), None, None, 0)[0]  # type: ignore[arg-type]
    # "has" and "the" are stop words; "Which" in upper case is none.
    assert swapped.item.question == item.question[:start] + "AAA AAA has the AAA AAA?" + item.question[end:]
    assert swapped.facts == {"n_words": 6, "n_eligible": 4, "n_swapped": 4, "realised_rate": round(4 / 6, 6)}


Files = Callable[[Path], Path]


def _scienceqa(folder: Path) -> Path:
    problem = {"question": QUESTION, "choices": ["red", "blue"], "answer": 1, "hint": "A circle is round.\nReally?"}
    (folder / "problems.json").write_text(json.dumps({"1": problem}))
    return folder


def _mmbench(folder: Path) -> Path:
    path = folder / "dev.tsv"
    path.write_text(f"index\tquestion\thint\tA\tB\tanswer\n1\t{QUESTION}\tWhich circle is meant?\tred\tblue\tB\n")
    return path


def _seedbench(folder: Path) -> Path:
    choices = {f"choice_{letter}": f"circle {letter}" for letter in "abcd"}
    row = {"question": QUESTION, "answer": "A", "question_id": "1", "question_type_id": 1, "data_id": "1", **choices}
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": [row]}))
    return folder / "SEED-Bench.json"


@pytest.mark.parametrize(
    ("name", "files"), [("scienceqa", _scienceqa), ("mmbench", _mmbench), ("seedbench", _seedbench)]
)
def test_hints_and_options_of_the_built_in_tasks_are_left(name: str, files: Files, tmp_path: Path) -> None:
    task = get_task(name)
    (item,) = task.load(files(tmp_path), tmp_path, tmp_path, 0)
    start, end = question_span(item)
    assert item.question[start:end] == QUESTION
    posed = QuestionSwap(rate=1.0).pose(item, (), None, None, 0)[0].item  # type: ignore[arg-type]
    offered = task.options(posed)
    assert offered is not None
    # Where likelihoods are asked after the question alone, that one is attacked too.
    assert offered.question in (None, "AAA AAA has the AAA AAA?")
    assert (offered.question is None) == (name != "seedbench")
    assert split_options(posed.question) == split_options(item.question)


def test_an_item_without_a_question_is_not_attacked() -> None:
    assert not QuestionSwap().applies_to(_item(SHORT_INSTRUCTION))
