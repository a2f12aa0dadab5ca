"""AI2D test (Kembhavi et al. 2016): questions about diagrams.

The labels in the pictures are masked by letters or not, which makes ten points and more: two tasks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from symphony_vlm.data.fields import shortened
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem, Scored
from symphony_vlm.evaluation.loading import key_of, needed, unique, whole_number
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.letters import LETTER_INSTRUCTION, letters, options_block, score_letter
from symphony_vlm.evaluation.task import Task

__all__ = ["TASKS"]

_HUB = {"lmms-lab/ai2d": True, "lmms-lab/ai2d-no-mask": False}
"""Data sets of the hub and whether their labels are masked."""
_LEADING = re.compile(r"([A-Z])\.").match


def _load(
    data: Path | None, image_folder: Path | None, scratch: Path, seed: int, *, mask: bool
) -> Sequence[EvaluationItem]:
    data = needed(data, f"a table with question, options, answer, image, or {'lmms-lab/ai2d' if mask else _no_mask()}")
    if _HUB.get(data.as_posix(), mask) != mask:
        raise InputError(
            f"its labels are {'not ' if mask else ''}masked",
            where=str(data),
            remedy=f"Use --task {'ai2d_no_mask' if mask else 'ai2d'}.",
        )
    rows = read_rows(data, split="test")
    return unique((_item(row, number, image_folder, mask) for number, row in enumerate(rows)), data)


def _no_mask() -> str:
    return next(name for name, masked in _HUB.items() if not masked)


def _item(row: Row, number: int, image_folder: Path | None, mask: bool) -> EvaluationItem:
    options = row.get("options")
    if not isinstance(options, list) or not 1 <= len(options) <= 26:
        raise row.error(f"field 'options' is {shortened(options)}; it must be a list of texts")
    choices, index = tuple(map(str, options)), row.text("answer")
    place = whole_number(index)
    if place is None or place >= len(choices):
        raise row.error(f"the answer is {shortened(index)}; it must be the index of one of {len(choices)} options")
    if row.fields.get("mask") not in (None, mask):
        raise row.error(
            f"field 'mask' is {shortened(row.fields['mask'])}", remedy="Use the other one of ai2d and ai2d_no_mask."
        )
    item_id = row.text("question_id", "id") if {"question_id", "id"} & set(row.fields) else str(number)
    images = row.images("image", folder=image_folder)
    return EvaluationItem(
        id=item_id,
        question=f"{row.text('question')}\n{options_block(choices)}{LETTER_INSTRUCTION}",
        answers=(letters(len(choices))[place],),
        images=images,
        image_key=key_of(images, item_id),
        choices=choices,
        meta={"mask": mask},
    )


def _score(prediction: str, item: EvaluationItem) -> Scored:
    scored = score_letter(prediction, item)
    leading = _LEADING(prediction.strip())
    if leading is None or leading[1] not in letters(len(item.choices)):
        return scored
    return Scored(
        score=scored.score, parsed=scored.parsed, status=scored.status, lenient=float(leading[1] == item.answers[0])
    )


def _task(name: str, split: str, *, mask: bool) -> Task:
    return Task(
        name=name, split=split, load=partial(_load, mask=mask), score=_score, max_new_tokens=128, counts={"test": 3088}
    )


TASKS = (_task("ai2d", "test, labels masked", mask=True), _task("ai2d_no_mask", "test, labels not masked", mask=False))
