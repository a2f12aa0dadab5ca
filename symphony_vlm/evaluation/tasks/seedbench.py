"""SEED-Bench (Li et al. 2023, AILab-CVC/SEED-Bench), its nine kinds of questions about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symphony_vlm.data.fields import shortened
from symphony_vlm.evaluation.item import EvaluationItem, Scored
from symphony_vlm.evaluation.loading import key_of, needed, unique, whole_number
from symphony_vlm.evaluation.options import Options
from symphony_vlm.evaluation.predictions import ID_FIELDS, read_answers_by
from symphony_vlm.evaluation.rows import Row, read_json, read_rows
from symphony_vlm.evaluation.rules.letters import LETTER_INSTRUCTION, letters, options_block, strict_letter
from symphony_vlm.evaluation.task import Task

__all__ = ["TASK"]

_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")
_IMAGE_TYPES = range(1, 10)


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "SEED-Bench.json or lmms-lab/SEED-Bench")
    rows = read_rows(data, inside=("questions",), split="test")
    names = _type_names(data)
    about_images = [row for row in rows if _type(row) in _IMAGE_TYPES]
    # LLaVA's answer files answer the questions about videos too, which are no items here and no error either.
    others = frozenset(row.text("question_id") for row in rows if _type(row) not in _IMAGE_TYPES)
    return unique((_item(row, names, image_folder, others) for row in about_images), data)


def _type(row: Row) -> int:
    value = row.text("question_type_id")
    number = whole_number(value)
    if number is None:
        raise row.error(f"question_type_id is {shortened(value)}; it must be a number")
    return number


def _type_names(data: Path) -> dict[int, str]:
    value = read_json(data) if data.is_file() and data.suffix == ".json" else {}
    named: Any = value.get("question_type") if isinstance(value, dict) else None
    pairs = named.items() if isinstance(named, dict) else ()
    return {number: name for name, number in pairs if isinstance(number, int)}


def _item(row: Row, names: dict[int, str], image_folder: Path | None, others: frozenset[str]) -> EvaluationItem:
    choices = tuple(row.text(name) for name in _CHOICES)
    answer = row.text("answer").strip()
    if answer not in tuple("ABCD"):
        raise row.error(f"the answer is {shortened(answer)}; it must be one of A, B, C and D")
    images = row.images("image", "data_id", folder=image_folder)
    return EvaluationItem(
        id=row.text("question_id"),
        question=f"{row.text('question')}\n{options_block(choices)}{LETTER_INSTRUCTION}",
        answers=(answer,),
        images=images,
        image_key=key_of(images, row.text("question_id")),
        group=names.get(_type(row), f"type {_type(row)}"),
        choices=choices,
        asked=row.text("question"),
        meta={"others": others},
    )


def _options(item: EvaluationItem) -> Options:
    """As the authors rank: the options' texts after the question alone."""
    return Options(question=item.asked, texts=item.choices, answers=tuple(letters(len(item.choices))))


def _score(prediction: str, item: EvaluationItem) -> Scored:
    """The text is the letter, as LLaVA scores; forgiving: its first character is."""
    if not prediction.strip():
        return Scored(score=0.0, parsed="", status="empty", lenient=0.0)
    lenient = float(prediction.strip()[:1] == item.answers[0])
    letter = strict_letter(prediction, len(_CHOICES))
    if letter is None:
        return Scored(score=0.0, parsed="", status="unparsed", lenient=lenient)
    return Scored(score=float(letter == item.answers[0]), parsed=letter, lenient=lenient)


def _read(path: Path, items: Sequence[EvaluationItem]) -> dict[str, str]:
    others = items[0].meta["others"] if items else frozenset()

    def key(row: Row) -> str | None:
        question_id = row.text(*ID_FIELDS)
        return None if question_id in others else question_id

    return read_answers_by(key, path, items)


def _self_contained(path: Path) -> list[tuple[EvaluationItem, str]]:
    """Results with ``gt_answer``, scored line by line: a repeated id counts as often as it stands there."""
    pairs = []
    for number, row in enumerate(read_rows(path)):
        answer = row.text("gt_answer").strip()
        item = EvaluationItem(
            id=f"{row.text('question_id')}#{number}", question="", answers=(answer,), image_key=row.text("question_id")
        )
        pairs.append((item, row.text("prediction")))
    return pairs


TASK = Task(
    name="seedbench",
    split="image",
    load=_load,
    score=_score,
    max_new_tokens=128,
    read_predictions=_read,
    read_self_contained=_self_contained,
    options=_options,
    counts={"image": 14233},
)
