"""VizWiz: questions that blind people asked about their photos (Gurari et al., arXiv 1802.08218; vizwiz.org).

Files: ``val.json`` (``[{image, question, answers, answer_type, answerable}]``), ``test.json`` without answers (to
export for the server), LLaVA's question lines, or lmms-lab/VizWiz-VQA. Predictions: ``[{image, answer}]``; LLaVA's
answer lines, whose ``question_id`` is the picture's name or needs the question file. Rule: `rules/vqa.py`, variant
``evalai``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from symphony_vlm.evaluation.benchmark_files import picture
from symphony_vlm.evaluation.breakdown import by_kind
from symphony_vlm.evaluation.judgements import known_score, not_judged
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of, share
from symphony_vlm.evaluation.predictions import ID_FIELDS, read_answers_by
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.vqa import normalize, ten_answers, vqa_score
from symphony_vlm.evaluation.rules.yes_no import SHORT_INSTRUCTION
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task
from symphony_vlm.evaluation.typed_fields import number_or_none, text_or_none

__all__ = ["TASK"]

_INSTRUCTION = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT_INSTRUCTION}"
_UNANSWERABLE = "unanswerable"


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "VizWiz's val.json, or lmms-lab/VizWiz-VQA")
    rows = read_rows(data, split=None if data.is_file() else "val")
    return unique((_item(row, data, image_folder) for row in rows), data)


def _name(row: Row) -> str:
    """The photo's name, which is the item's id; hub rows hold the photo itself, and the name as ``question_id``."""
    image = row.fields.get("image")
    name = image if isinstance(image, str) else row.text("question_id", "id")
    return name if "." in name else f"{name}.jpg"


def _item(row: Row, data: Path, image_folder: Path | None) -> EvaluationItem:
    images, _ = picture(row, data, image_folder, "image")
    kind = text_or_none(row, "answer_type", "category")
    answerable = number_or_none(row, "answerable")
    return EvaluationItem(
        id=_name(row),
        # LLaVA's question lines have the instruction in their text.
        question=f"{row.text('question')}{_INSTRUCTION}" if "question" in row.fields else row.text("text"),
        answers=ten_answers(row),
        images=images,
        image_key=_name(row),
        group=kind,
        meta={"unanswerable": kind == _UNANSWERABLE if answerable is None else not answerable},
    )


def score(prediction: str, item: EvaluationItem) -> Scored:
    """VQA accuracy after the ``evalai`` normaliser."""
    if not item.answers:
        return not_judged(prediction)
    return vqa_score(prediction, normalize(prediction), [normalize(answer) for answer in item.answers])


def _read(path: Path, items: Sequence[EvaluationItem]) -> dict[str, str]:
    return read_answers_by(_answered, path, items)


def _read_with_questions(path: Path, items: Sequence[EvaluationItem], questions: Path) -> dict[str, str]:
    return read_answers_by(_answered, path, items, questions=questions)


def _answered(row: Row) -> str:
    name = row.text("image", *ID_FIELDS)
    return name if "." in name else f"{name}.jpg"


def _f1_terms(outcomes: Sequence[Outcome]) -> Floats:
    rows = np.zeros((len(outcomes), 2))
    for row, outcome in zip(rows, outcomes, strict=True):
        if outcome.item.answers:
            said = outcome.prediction is not None and normalize(outcome.prediction) == _UNANSWERABLE
            true = bool(outcome.item.meta["unanswerable"])
            row[:] = 2.0 * (said and true), float(said) + float(true)
    return rows


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    return [
        mean_of("accuracy", known_score),
        *by_kind("accuracy", outcomes, lambda outcome: (outcome.item.group,) if outcome.item.group else ()),
        Metric(name="f1_unanswerable", terms=_f1_terms, combine=share),
    ]


def _export(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What the server takes: every photo, the empty string where there is no answer."""
    return [{"image": outcome.item.id, "answer": normalize(outcome.prediction or "")} for outcome in outcomes]


TASK = Task(
    name="vizwiz",
    split="val",
    load=_load,
    score=score,
    max_new_tokens=128,
    metrics=_metrics,
    read_predictions=_read,
    read_with_questions=_read_with_questions,
    counts={"val": 4319, "test": 8000},
    export=_export,
)
