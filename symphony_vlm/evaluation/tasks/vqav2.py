"""VQAv2, open-ended questions about COCO pictures (Goyal et al., arXiv 1612.00837; GT-Vision-Lab/VQA).

Files: the folder of ``*questions*.json`` and ``*annotations*.json``, one of the two (annotations are enough to score,
questions to export for the server), LLaVA's question lines, or lmms-lab/VQAv2. Predictions: ``[{question_id, answer}]``
or LLaVA's answer lines. The official rule normalises only where the ten human answers are not all the same, so that
``Yes`` is wrong against ten ``yes``; the lenient one always does, as other harnesses do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.benchmark_files import find_file, picture, short_prompt
from symphony_vlm.evaluation.breakdown import by_kind
from symphony_vlm.evaluation.judgements import known_lenient, known_score, not_judged
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of, share
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.vqa import normalize, one_line, soft_accuracy, ten_answers, vqa_score
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task
from symphony_vlm.evaluation.typed_fields import text_or_none

__all__ = ["TASK"]

_INSIDE = ("questions", "annotations")
_split_of = re.compile(r"(?:train|val|test)20\d\d").search


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "the folder of the questions' and the annotations' file, one of them, or lmms-lab/VQAv2")
    rows, split = _rows(data)
    return unique((_item(row, data, image_folder, split) for row in rows), data)


def _rows(data: Path) -> tuple[list[Row], str]:
    """Questions joined with their annotations, and COCO's name of the split."""
    questions = find_file(data, "*uestions*.json") if data.is_dir() else None
    annotations = find_file(data, "*nnotations*.json") if data.is_dir() else None
    if questions is None and annotations is None:
        rows = read_rows(data, inside=_INSIDE, split=None if data.is_file() else "validation")
        found = _split_of(data.name)
        return rows, found[0] if found else "val2014"
    first = questions or annotations
    assert first is not None
    rows = read_rows(first, inside=_INSIDE)
    if questions is not None and annotations is not None:
        rows = _joined(rows, read_rows(annotations, inside=_INSIDE))
    found = _split_of(first.name)
    return rows, found[0] if found else "val2014"


def _joined(questions: Sequence[Row], annotations: Sequence[Row]) -> list[Row]:
    fields: dict[str, Mapping[str, Any]] = {}
    for row in annotations:
        if fields.setdefault(row.text("question_id"), row.fields) is not row.fields:
            raise row.error(f"a second annotation of the question {row.text('question_id')}")
    if missing := [row for row in questions if row.text("question_id") not in fields]:
        raise missing[0].error(
            f"has no annotation ({len(missing)} questions have none)",
            remedy="Questions and annotations must be of the same split.",
        )
    if len(fields) > len(questions):
        raise InputError(
            f"{len(fields)} annotations for {len(questions)} questions",
            where=annotations[0].where,
            remedy="Questions and annotations must be of the same split.",
        )
    return [Row({**fields[row.text("question_id")], **row.fields}, row.where) for row in questions]


def _item(row: Row, data: Path, image_folder: Path | None, split: str) -> EvaluationItem:
    # LLaVA's question lines have the instruction in their text, and the picture's name.
    question = row.text("text") if "text" in row.fields else short_prompt(text_or_none(row, "question") or "")
    image_id = text_or_none(row, "image_id")
    if image_id is not None and not image_id.isdecimal():
        raise row.error(f"field 'image_id' is {image_id!r}; it must be a number of COCO")
    name = None if image_id is None else f"COCO_{split}_{int(image_id):012d}.jpg"
    images, key = picture(row, data, image_folder, "image", name=name)
    return EvaluationItem(
        id=row.text("question_id"),
        question=question,
        answers=ten_answers(row),
        images=images,
        image_key=key,
        group=text_or_none(row, "answer_type"),
        meta={"question_type": text_or_none(row, "question_type")},
    )


def score(prediction: str, item: EvaluationItem) -> Scored:
    """The official rule; always normalised: the lenient one."""
    if not item.answers:
        return not_judged(prediction)
    text, answers = one_line(prediction), [one_line(answer) for answer in item.answers]
    forms = {answer: normalize(answer, "vqa") for answer in {text, *answers}}
    normalized, all_normalized = forms[text], [forms[answer] for answer in answers]
    lenient = soft_accuracy(normalized, all_normalized)
    if len(set(answers)) > 1:
        return vqa_score(prediction, normalized, all_normalized, lenient=lenient)
    return vqa_score(prediction, text, answers, lenient=lenient)


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    metrics = [
        mean_of("accuracy", known_score),
        mean_of("accuracy_lenient", known_lenient),
        *by_kind("accuracy/answer_type", outcomes, lambda outcome: _name(outcome.item.group)),
        *by_kind("accuracy/question_type", outcomes, lambda outcome: _name(outcome.item.meta["question_type"])),
    ]
    return [replace(metric, combine=_percentage, scale=100.0) for metric in metrics]


def _name(value: object) -> tuple[str, ...]:
    return (str(value),) if value else ()


def _percentage(sums: Floats) -> Floats:
    """100 x mean to 2 decimals, as the official script prints it."""
    return np.round(100 * share(sums), 2)


def _export(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What the server takes: every question, the empty string where there is no answer."""
    return [
        {
            "question_id": int(outcome.item.id) if outcome.item.id.isdecimal() else outcome.item.id,
            "answer": normalize(outcome.prediction or ""),
        }
        for outcome in outcomes
    ]


TASK = Task(
    name="vqav2",
    split="val",
    load=_load,
    score=score,
    max_new_tokens=128,
    metrics=_metrics,
    counts={"val": 214_354, "test-dev": 107_394, "test": 447_793},
    export=_export,
)
