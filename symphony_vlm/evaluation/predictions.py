"""Prediction files: answers by the id of the question, joined to items by key and never by position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from symphony_vlm.data.fields import shortened
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
    key: Callable[[Row], str | None],
    path: Path,
    items: Sequence[EvaluationItem],
    *,
    questions: Path | None = None,
    text_fields: Sequence[str] = TEXT_FIELDS,
) -> dict[str, str]:
    """`read_answers` with the benchmark's own key.

    Args:
        key: Row -> item id; None passes a row over that is known to belong elsewhere.
        path: The answers.
        items: What was asked.
        questions: LLaVA's question file; each answer line gets the fields of the line of its ``question_id``, and
            ``question`` holds that line's text.
        text_fields: Where a row has its answer, the first that is there.
    """
    asked = {} if questions is None else _questions(questions)
    answers = []
    for row in read_rows(path, as_pairs=("question_id", "text")):
        text = answer_text(row, text_fields)
        if questions is not None:
            question_id = row.text(*ID_FIELDS)
            if question_id not in asked:
                raise row.error(f"question_id {shortened(question_id)} is not in {questions.name}")
            row = Row({**asked[question_id], **row.fields}, row.where)
        item_id = key(row)
        if text is not None and item_id is not None:
            answers.append((row, item_id, text))
    return join_answers(answers, items)


def answer_text(row: Row, fields: Sequence[str] = TEXT_FIELDS) -> str | None:
    """The answer of a row, as it stands: some official rules tell ``no`` from ``no`` with a line end.

    None where the field is null, as in our own record of an item that failed.
    """
    for name in fields:
        # The first field that is there, null or not: behind it a record may have the truth as its answer.
        if name in row.fields:
            return None if row.fields[name] is None else row.text(name)
    raise row.error(f"no answer: none of the fields {', '.join(fields)} is there")


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
            raise row.error(f"a second answer to {shortened(item_id)}", remedy="Keep one answer per question.")
        if item_id not in known:
            example = f", for example {shortened(items[0].id)}" if items else ""
            raise row.error(
                f"{shortened(item_id)} is no question of the benchmark",
                remedy=f"It has {len(items)} questions{example}; check that the two files belong together.",
            )
        found[item_id] = text
    return found


def _questions(path: Path) -> dict[str, Mapping[str, Any]]:
    """LLaVA's questions by id, their text under ``question``."""
    asked: dict[str, Mapping[str, Any]] = {}
    for row in read_rows(path):
        question_id = row.text(*ID_FIELDS)
        if question_id in asked:
            raise row.error(
                f"question_id {shortened(question_id)} stands twice, so answers cannot be told apart",
                remedy="Score each split with its own question file.",
            )
        asked[question_id] = {**row.fields, "question": row.text("text", "question")}
    return asked
