"""OCRBench v1: ten kinds of reading (Liu et al., arXiv 2305.07895; Yuliang-Liu/MultimodalOCR).

Files: ``OCRBench.json`` (``[{id, dataset_name, image_path, question, answers, type}]``), or echo840/OCRBench.
Predictions: by ``id``, or the authors' result file, which is the same list with ``predict`` and needs no annotations.
The figure is the number of right answers, of 1,000. An answer is right if it is contained in the prediction, so a
digit also matches inside a longer number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from symphony_vlm.evaluation.benchmark_files import SAID, picture
from symphony_vlm.evaluation.breakdown import by_kind
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of
from symphony_vlm.evaluation.predictions import ID_FIELDS, answer_text, join_answers
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task
from symphony_vlm.evaluation.typed_fields import text_or_none, texts

__all__ = ["TASK"]

_FORMULAS = "HME100k"
"""Handwritten formulas: case matters, spaces do not."""


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "OCRBench.json, or echo840/OCRBench")
    rows = read_rows(data, split=None if data.is_file() else "test")
    return unique((_item(row, number, data, image_folder) for number, row in enumerate(rows)), data)


def _item(row: Row, number: int, data: Path, image_folder: Path | None) -> EvaluationItem:
    images, key = picture(row, data, image_folder, "image", "image_path")
    return EvaluationItem(
        id=text_or_none(row, "id") or str(number),
        question=row.text("question").strip(),
        answers=_answers(row),
        images=images,
        image_key=key,
        group=row.text("type", "question_type"),
        meta={"dataset": row.text("dataset_name", "dataset")},
    )


def _answers(row: Row) -> tuple[str, ...]:
    name = "answers" if row.fields.get("answers") is not None else "answer"
    answers = texts(row, name) if isinstance(row.fields.get(name), list) else (row.text(name),)
    if not any(answers):
        raise row.error("has no answer; the empty text would be contained in every prediction")
    return answers


def score(prediction: str, item: EvaluationItem) -> Scored:
    """Whether an answer is contained in the prediction."""
    formulas = item.meta["dataset"] == _FORMULAS
    parsed = _comparable(prediction, formulas)
    right = any(_comparable(answer, formulas) in parsed for answer in item.answers)
    return Scored(score=float(right), parsed=parsed, status="ok" if parsed else "empty")


def _comparable(text: str, formulas: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if formulas else text.lower()


def _read(path: Path, items: Sequence[EvaluationItem]) -> dict[str, str]:
    rows = read_rows(path, as_pairs=("id", "predict"))
    return join_answers(
        ((row, row.text(*ID_FIELDS), text) for row in rows if (text := _predicted(row)) is not None), items
    )


def _predicted(row: Row) -> str | None:
    return answer_text(row, ("predict", *SAID))


def _self_contained(path: Path) -> list[tuple[EvaluationItem, str]]:
    pairs = []
    for number, row in enumerate(read_rows(path)):
        if (text := _predicted(row)) is not None:
            pairs.append((_item(row, number, path, None), text))
    unique((item for item, _ in pairs), path)
    return pairs


def _count_terms(outcomes: Sequence[Outcome]) -> Floats:
    return np.array([[outcome.scored.score] for outcome in outcomes])


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    """The number of right answers, in all and per type, and the share of right ones."""
    total = Metric(
        name="score", terms=_count_terms, combine=lambda sums: sums[..., 0], scale=float(max(len(outcomes), 1))
    )
    types = by_kind("score", outcomes, lambda outcome: (str(outcome.item.group),))
    return [total, mean_of("accuracy"), *(_counted(metric, outcomes) for metric in types)]


def _counted(metric: Metric, outcomes: Sequence[Outcome]) -> Metric:
    """A mean's sum of scores."""
    return replace(metric, combine=lambda sums: sums[..., 0], scale=float(max(len(metric.members(outcomes)), 1)))


TASK = Task(
    name="ocrbench",
    split="test",
    load=_load,
    score=score,
    max_new_tokens=128,
    metrics=_metrics,
    read_predictions=_read,
    read_self_contained=_self_contained,
    counts={"v1": 1000},
)
