"""LLaVA-Bench (in the wild): 60 open questions, judged against a reference answer (Liu et al., arXiv 2304.08485).

Files: the folder of ``questions.jsonl``, ``answers_gpt4.jsonl`` and ``context.jsonl`` (the last two to export), the
questions alone, or lmms-lab/llava-bench-in-the-wild. ``--export`` writes what a judge has to see. Reviews (JSON lines
``question_id, category, tuple, content``) are read in place of predictions; of the tuple the first score is the
reference answer's. A review that could not be parsed is stored as (-1, -1) and counts in the official mean, so that
failed calls raised scores; here it is left out and counted as unparsed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from symphony_vlm.evaluation.benchmark_files import find_file, picture
from symphony_vlm.evaluation.judgements import not_judged
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, share
from symphony_vlm.evaluation.predictions import ID_FIELDS, answer_text, join_answers
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task
from symphony_vlm.evaluation.typed_fields import text_or_none, texts

__all__ = ["TASK"]

_HIGHEST = 10.0


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "the folder of questions.jsonl, or lmms-lab/llava-bench-in-the-wild")
    file = find_file(data, "questions.jsonl") if data.is_dir() else None
    rows = read_rows(file or data, split=None if (file or data).is_file() else "train")
    folder = image_folder or (data / "images" if (data / "images").is_dir() else None)
    references = _beside(data, "answers_gpt4.jsonl", ID_FIELDS, lambda row: row.text("text"))
    contexts = _beside(data, "context.jsonl", ("image",), _caption)
    return unique((_item(row, data, folder, references, contexts) for row in rows), data)


def _beside(data: Path, name: str, key: Sequence[str], value: Callable[[Row], str]) -> dict[str, str]:
    file = data / name
    return {row.text(*key): value(row) for row in read_rows(file)} if file.is_file() else {}


def _caption(row: Row) -> str:
    """What the judge is told of the picture: a text, or lines of one."""
    is_list = isinstance(row.fields.get("caption"), list)
    return "\n".join(texts(row, "caption")) if is_list else text_or_none(row, "caption") or ""


def _item(
    row: Row, data: Path, folder: Path | None, references: dict[str, str], contexts: dict[str, str]
) -> EvaluationItem:
    images, key = picture(row, data, folder, "image")
    question_id = row.text("question_id")
    image = row.fields.get("image")
    context = _caption(row) or (contexts.get(image, "") if isinstance(image, str) else "")
    return EvaluationItem(
        id=question_id,
        question=row.text("text", "question"),
        answers=(text_or_none(row, "gpt_answer") or references.get(question_id, ""),),
        images=images,
        image_key=key,
        group=_category(row),
        meta={"context": context},
    )


def _category(row: Row) -> str | None:
    value = text_or_none(row, "category")
    return value.removeprefix("llava_bench_") if value else None


def score(prediction: str, item: EvaluationItem) -> Scored:
    """The judge's second score, of 10, if the item brings a review."""
    if "review" not in item.meta:
        return not_judged(prediction)
    review: tuple[float, float] | None = item.meta["review"]
    if review is None:
        return Scored(score=math.nan, parsed="", status="unparsed")
    return Scored(score=review[1] / _HIGHEST, parsed=f"{review[0]:g} {review[1]:g}")


def read_results(path: Path, items: Sequence[EvaluationItem]) -> list[tuple[EvaluationItem, str]]:
    """Reviews or, of answers nobody has judged, the answers."""
    rows = read_rows(path, as_pairs=("question_id", "text"))
    reviewed = [_is_review(row) for row in rows]
    texts = [
        (row, row.text(*ID_FIELDS), "" if judged else answer_text(row))
        for row, judged in zip(rows, reviewed, strict=True)
    ]
    found = join_answers(((row, name, text) for row, name, text in texts if text is not None), items)
    reviews = {row.text(*ID_FIELDS): _review(row) for row, judged in zip(rows, reviewed, strict=True) if judged}
    return [
        (replace(item, meta={**item.meta, "review": reviews[item.id]}) if item.id in reviews else item, found[item.id])
        for item in items
        if item.id in found
    ]


def _self_contained(path: Path) -> list[tuple[EvaluationItem, str]]:
    rows = read_rows(path)
    for row in rows:
        if not _is_review(row):
            raise row.error(
                "is no review: there is neither 'tuple' nor 'content'",
                remedy="Add --annotations with the questions' folder and --export to write what the judge reads.",
            )
    items = [
        EvaluationItem(
            id=row.text("question_id"),
            question="",
            answers=("",),
            image_key=row.text("question_id"),
            group=_category(row),
            meta={"review": _review(row)},
        )
        for row in rows
    ]
    return [(item, "") for item in unique(items, path)]


def _is_review(row: Row) -> bool:
    return "tuple" in row.fields or ("content" in row.fields and "text" not in row.fields)


def _review(row: Row) -> tuple[float, float] | None:
    """Both scores, of the tuple or of the review's first line; None if the judge gave no such thing."""
    value = row.fields.get("tuple")
    if value is None:
        words = row.text("content").partition("\n")[0].replace(",", " ").split()
        try:
            value = [float(word) for word in words]
        except ValueError:
            return None
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(x, (int, float)) for x in value):
        return None
    return (float(value[0]), float(value[1])) if all(0 <= x <= _HIGHEST for x in value) else None


def _terms(where: Callable[[Outcome], bool]) -> Callable[[Sequence[Outcome]], Floats]:
    def terms(outcomes: Sequence[Outcome]) -> Floats:
        rows = np.zeros((len(outcomes), 2))
        for row, outcome in zip(rows, outcomes, strict=True):
            review = outcome.item.meta.get("review")
            if review is not None and where(outcome):
                row[:] = review[1], review[0]
        return rows

    return terms


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    groups = sorted({outcome.item.group for outcome in outcomes if outcome.item.group is not None})
    return [
        _relative("relative_score", lambda outcome: True),
        *(_relative(f"relative_score/{group}", _in(group)) for group in groups),
    ]


def _in(group: str) -> Callable[[Outcome], bool]:
    return lambda outcome: outcome.item.group == group


def _relative(name: str, where: Callable[[Outcome], bool]) -> Metric:
    return Metric(name=name, terms=_terms(where), combine=lambda sums: 100 * share(sums), scale=100.0, where=where)


def _export(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What a judge has to see, a record a question."""
    return [
        {
            "question_id": outcome.item.id,
            "category": outcome.item.group,
            "context": outcome.item.meta["context"],
            "question": outcome.item.question,
            "reference": outcome.item.answers[0],
            "text": (outcome.prediction or "").strip(),
        }
        for outcome in outcomes
    ]


TASK = Task(
    name="llava_bench",
    split="in the wild",
    load=_load,
    score=score,
    max_new_tokens=1024,
    metrics=_metrics,
    read_results=read_results,
    read_self_contained=_self_contained,
    counts={"in the wild": 60},
    export=_export,
)
