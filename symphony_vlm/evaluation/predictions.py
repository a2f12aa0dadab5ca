"""Prediction files: answers by the id of the question, joined to items by key and never by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.rows import Row, read_rows

__all__ = ["ID_FIELDS", "TEXT_FIELDS", "answer_text", "join_answers", "read_answers", "read_answers_by"]

ID_FIELDS = ("question_id", "questionId", "item_id", "id", "index")
"""Where an answer line has the id of its question, the first that is there."""
TEXT_FIELDS = ("text", "prediction", "answer", "response", "pred")
"""Where it has the answer, the first that is there."""


def read_answers(path: Path, items: Sequence[EvaluationItem]) -> dict[str, str]:
    """Answers by the id of the item.

    Args:
        path: LLaVA's answer lines (``question_id, text``), our own records (``item_id, prediction``), a list of such
            objects, or one object ``{id: text}``.
        items: What was asked.

    Returns:
        Item id -> text. A missing item is not an error.

    Raises:
        InputError: Not readable, an id that stands twice or belongs to no item, no text.
    """
    return read_answers_by(lambda row: row.text(*ID_FIELDS), path, items)


def read_answers_by(
    key: Callable[[Row], str], path: Path, items: Sequence[EvaluationItem], *, questions: Path | None = None
) -> dict[str, str]:
    """`read_answers` with the benchmark's own key.

    Args:
        key: Row -> item id.
        path: The answers.
        items: What was asked.
        questions: LLaVA's question file; each answer line gets the fields of the line of its ``question_id``, and
            ``question`` holds that line's text.
    """
    rows: Iterable[Row] = read_rows(path, as_pairs=("question_id", "text"))
    if questions is not None:
        rows = _with_questions(rows, questions)
    return join_answers(((row, key(row), answer_text(row)) for row in rows), items)


def answer_text(row: Row) -> str:
    """The answer of a row, as it stands: some official rules tell ``no`` from ``no`` with a line end."""
    value = row.get(*TEXT_FIELDS)
    if not isinstance(value, str):
        raise row.error(f"the answer is {value!r}; it must be a string")
    return value


def join_answers(answers: Iterable[tuple[Row, str, str]], items: Sequence[EvaluationItem]) -> dict[str, str]:
    """Checks that every answer belongs to one item and no item has two.

    Args:
        answers: Row (for messages), item id, text.
        items: What was asked.
    """
    known = {item.id for item in items}
    found: dict[str, str] = {}
    for row, item_id, text in answers:
        if item_id in found:
            raise row.error(f"a second answer to {item_id!r}", remedy="Keep one answer per question.")
        if item_id not in known:
            example = f", for example {items[0].id!r}" if items else ""
            raise row.error(
                f"{item_id!r} is no question of the benchmark",
                remedy=f"It has {len(items)} questions{example}; check that the two files belong together.",
            )
        found[item_id] = text
    return found


def _with_questions(rows: Iterable[Row], questions: Path) -> Iterable[Row]:
    asked: dict[str, Mapping[str, Any]] = {}
    for row in read_rows(questions):
        question_id = row.text(*ID_FIELDS)
        if question_id in asked:
            raise row.error(
                f"question_id {question_id!r} stands twice, so answers cannot be told apart",
                remedy="Score each split with its own question file.",
            )
        fields = dict(row.fields)
        fields["question"] = fields.pop("text", fields.get("question"))
        asked[question_id] = fields
    for row in rows:
        question_id = row.text(*ID_FIELDS)
        if question_id not in asked:
            raise row.error(f"question_id {question_id!r} is not in {questions.name}")
        yield Row(fields={**asked[question_id], **row.fields}, where=row.where)
