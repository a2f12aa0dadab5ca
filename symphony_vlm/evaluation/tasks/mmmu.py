"""MMMU validation (Yue et al. 2023, MMMU-Benchmark/MMMU): 30 subjects of 30 questions, multiple choice and open."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from symphony_vlm.data.fields import is_given, shortened
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.loading import key_of, needed, unique
from symphony_vlm.evaluation.metrics import Metric, group_accuracies, mean_of
from symphony_vlm.evaluation.predictions import join_answers, read_answers
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.letters import LETTER_INSTRUCTION, letters, strict_letter
from symphony_vlm.evaluation.rules.mmmu import mmmu_letter
from symphony_vlm.evaluation.rules.numbers import open_answers, open_is_right
from symphony_vlm.evaluation.rules.yes_no import SHORT_INSTRUCTION
from symphony_vlm.evaluation.task import Task

__all__ = ["DISCIPLINES", "TASK"]

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
_DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}

_ID = re.compile(r"(?:dev|validation|test)_(.+)_\d+").fullmatch
_MARK = re.compile(r"<image (\d)>").findall
_KINDS = {"multiple-choice": True, "open": False, "short-answer": False}
"""Values of ``question_type`` and whether they are a choice."""
_MAX_OPTIONS_TEXT = 100_000


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "answer_dict_val.json, the folder of the 30 subjects, or lmms-lab/MMMU")
    if data.is_dir() and _results(data):
        return [item for item, _ in _self_contained(data)]
    rows: list[Row] = []
    subjects = [folder for folder in sorted(data.iterdir()) if folder.name in _DISCIPLINE_OF] if data.is_dir() else []
    for source in subjects or [data]:
        rows += read_rows(source, as_pairs=("id", "ground_truth"), split="validation")
    # The order of the official script, whose guesses depend on it: subjects by name, items as they come.
    return sorted(unique((_item(row, image_folder) for row in rows), data), key=lambda item: item.group or "")


def _item(row: Row, image_folder: Path | None) -> EvaluationItem:
    """A question of the data set, of the answer dictionary, or of a result file (``output.json``)."""
    item_id = row.text("id")
    match = _ID(item_id)
    if match is None or match[1] not in _DISCIPLINE_OF:
        raise row.error(
            f"the id {shortened(item_id)} names no subject of MMMU; it must look like validation_Accounting_1"
        )
    kind = row.text("question_type")
    if kind not in _KINDS:
        raise row.error(f"question_type is {shortened(kind)}; it must be one of {', '.join(_KINDS)}")
    is_choice = _KINDS[kind]
    choices = _choices(row) if is_choice else ()
    images, unsupported = _images(row, choices, image_folder)
    return EvaluationItem(
        id=item_id,
        question=_prompt(row.text("question"), choices) if "question" in row.fields else "",
        answers=_answers(row, is_choice, choices),
        images=images,
        image_key=key_of(images, item_id),
        group=match[1],
        choices=choices,
        meta={"open": not is_choice, "unsupported": unsupported},
    )


def _prompt(question: str, choices: Sequence[str]) -> str:
    if not choices:
        return question + SHORT_INSTRUCTION
    block = "".join(f"({letter}) {text}\n" for letter, text in zip(letters(len(choices)), choices, strict=True))
    return f"{question}\n{block}{LETTER_INSTRUCTION}"


def _choices(row: Row) -> tuple[str, ...]:
    """Options as a list, as a list written as a string, or by letter; none in the answer dictionary."""
    by_letter = row.fields.get("index2ans")
    if isinstance(by_letter, dict) and len(by_letter) <= 26:
        return tuple(str(by_letter.get(letter, "")) for letter in letters(len(by_letter)))
    options: Any = row.fields.get("options")
    if options is None:
        return ()
    options = _literal(options)
    if not isinstance(options, list) or not 1 <= len(options) <= 26:
        raise row.error(f"field 'options' is {shortened(row.fields['options'])}; it must be a list of texts")
    return tuple(map(str, options))


def _literal(value: Any) -> Any:
    """A list that is written as a string, as a list; anything else as it is. Nothing is evaluated."""
    if not isinstance(value, str) or not value.startswith("[") or len(value) > _MAX_OPTIONS_TEXT:
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # an answer that only begins with a bracket
        return value


def _answers(row: Row, is_choice: bool, choices: Sequence[str]) -> tuple[str, ...]:
    value = row.get("ground_truth", "answer")
    if not is_choice and isinstance(literal := _literal(value), list):
        value = literal
    answers = tuple(map(str, value)) if isinstance(value, list) else (row.text("ground_truth", "answer"),)
    if is_choice and (len(answers) != 1 or (choices and answers[0] not in tuple(letters(len(choices))))):
        raise row.error(f"the answer is {shortened(value)}; it must be the letter of one of {len(choices)} options")
    return answers


def _images(row: Row, choices: Sequence[str], folder: Path | None) -> tuple[tuple[ImageRef, ...], bool]:
    """The first picture, as the authors' LLaVA configuration; none where options are made of several pictures."""
    unsupported = len(set(_MARK(" ".join(choices)))) > 1
    if unsupported:
        return (), True
    given = [name for name in ("image", *(f"image_{n}" for n in range(1, 8))) if is_given(row.fields.get(name))]
    return (row.images(given[0], folder=folder) if given else ()), False


def _score(prediction: str, item: EvaluationItem) -> Scored:
    if item.meta["open"]:
        predicted = open_answers(prediction)
        return Scored(
            score=float(open_is_right(predicted, item.answers)),
            parsed="; ".join(map(str, predicted)),
            status="ok" if prediction.strip() else "empty",
        )
    # Without options: answers that were parsed already (total_val_output.json), joined with the answer dictionary.
    letter = mmmu_letter(prediction, item.choices) if item.choices else strict_letter(prediction, 26)
    if letter is None:
        return Scored(score=0.0, parsed="", status="unparsed" if prediction.strip() else "empty")
    return Scored(score=float(letter == item.answers[0]), parsed=letter)


def _results(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/output.json"), key=lambda path: path.parent.name)


def _result_rows(folder: Path) -> Iterator[Row]:
    for path in _results(folder):
        for row in read_rows(path):
            yield Row(row.fields, f"{path.parent.name}/{row.where}")


def _self_contained(path: Path) -> list[tuple[EvaluationItem, str]]:
    """The authors' results: a folder of subjects with ``output.json``, subjects by name, items as they come."""
    rows = list(_result_rows(path)) if path.is_dir() else []
    if not rows:
        raise InputError(
            "lacks the truth",
            where=str(path),
            remedy="Add --annotations answer_dict_val.json, or give the folder with <Subject>/output.json.",
        )
    items = unique((_item(row, None) for row in rows), path)
    return [(item, row.text("response")) for item, row in zip(items, rows, strict=True)]


def _read(path: Path, items: Sequence[EvaluationItem]) -> dict[str, str]:
    if path.is_dir():
        return join_answers(((row, row.text("id"), row.text("response")) for row in _result_rows(path)), items)
    return read_answers(path, items)


def _supported(outcome: Outcome) -> bool:
    return not outcome.item.meta["unsupported"]


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    more = []
    if any(outcome.item.meta["unsupported"] for outcome in outcomes):
        more.append(mean_of("accuracy_supported", where=_supported))
    return [
        mean_of("accuracy"),
        *more,
        *group_accuracies(outcomes, lambda outcome: _DISCIPLINE_OF[outcome.item.group or ""]),
        *group_accuracies(outcomes),
    ]


TASK = Task(
    name="mmmu",
    split="validation",
    load=_load,
    score=_score,
    max_new_tokens=128,
    metrics=_metrics,
    read_predictions=_read,
    read_self_contained=_self_contained,
    counts={"validation": 900},
)
