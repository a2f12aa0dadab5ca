"""GQA, balanced test-dev questions (Hudson and Manning, arXiv 1902.09506; cs.stanford.edu/people/dorarad/gqa).

Files: ``testdev_balanced_questions.json`` (``{id: question}``), or lmms-lab/GQA, whose pictures are a subset of their
own. Predictions: ``[{questionId, prediction}]`` or LLaVA's answer lines. Rule: equal to the answer after
``rstrip('.').lower()``. All figures are over balanced questions; validity and plausibility need a file that test-dev
lacks and are null. Of the questions that an answer entails, those count that are in the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from symphony_vlm.data.fields import shortened
from symphony_vlm.evaluation.benchmark_files import SAID, picture, short_prompt
from symphony_vlm.evaluation.breakdown import by_kind
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of, share
from symphony_vlm.evaluation.predictions import ID_FIELDS, read_answers_by
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task
from symphony_vlm.evaluation.typed_fields import object_or_empty, texts

__all__ = ["TASK", "distribution"]

_NO_STEP = ("exist", "query: name", "choose name")
"""Operations that end a question and add nothing to the length of its reasoning."""


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "testdev_balanced_questions.json, or lmms-lab/GQA")
    rows, pictures = _rows(data)
    return unique((_item(row, pictures, data, image_folder) for row in rows), data)


def _rows(data: Path) -> tuple[list[Row], Mapping[str, Row]]:
    """Questions, and rows with pictures by image id where they are a part of the data."""
    if data.is_file():
        return read_rows(data, as_pairs=("question_id", "answer")), {}
    name = "testdev_balanced"
    if (data / f"{name}_instructions").is_dir():
        rows = read_rows(data / f"{name}_instructions", split="testdev")
        images = data / f"{name}_images"
        return rows, {row.text("id"): row for row in read_rows(images, split="testdev")} if images.is_dir() else {}
    if data.is_dir():
        return read_rows(data), {}
    rows = read_rows(data, subset=f"{name}_instructions", split="testdev")
    return rows, {row.text("id"): row for row in read_rows(data, subset=f"{name}_images", split="testdev")}


def _item(row: Row, pictures: Mapping[str, Row], data: Path, image_folder: Path | None) -> EvaluationItem:
    image_id = row.text("imageId", "image_id")
    images, key = picture(pictures.get(image_id, row), data, image_folder, "image", name=f"{image_id}.jpg")
    question, types, groups = row.text("question"), _texts_of(row, "types"), _texts_of(row, "groups")
    return EvaluationItem(
        id=row.text("question_id", "id"),
        question=short_prompt(question),
        answers=(row.text("answer"),),
        images=images,
        image_key=key,
        group=types.get("structural"),
        meta={
            "balanced": bool(row.fields.get("isBalanced", True)),
            "structural": types.get("structural"),
            "semantic": types.get("semantic"),
            "words": len(question.split()),
            "steps": _steps(row),
            "global_group": groups.get("global"),
            "entailed": _entailed(row),
        },
    )


def _texts_of(row: Row, name: str) -> dict[str, str]:
    """The entries of an object, without those that are null."""
    inner = Row(object_or_empty(row, name), f"{row.where}, field {name!r}")
    return {key: inner.text(key) for key, value in inner.fields.items() if value is not None}


def _steps(row: Row) -> int | None:
    """How many operations the reasoning needs; None if the question has no program."""
    program = row.fields.get("semantic")
    if program is None:
        return None
    if not isinstance(program, list) or not all(isinstance(step, dict) for step in program):
        raise row.error(f"field 'semantic' is {shortened(program)}; it must be a list of operations")
    operations = [f"{step.get('operation')}: {step.get('argument')}" for step in program]
    return sum(not any(word in operation for word in _NO_STEP) for operation in operations)


def _entailed(row: Row) -> tuple[str, ...]:
    """Ids of a list, or of a list written as text as the hub has it."""
    value = row.fields.get("entailed")
    return tuple(re.findall(r"\w+", value)) if isinstance(value, str) else texts(row, "entailed")


def score(prediction: str, item: EvaluationItem) -> Scored:
    """Equal to the answer after final periods are removed, in lower case."""
    parsed = _parsed(prediction)
    return Scored(score=float(parsed == item.answers[0]), parsed=parsed, status="ok" if parsed else "empty")


def _parsed(prediction: str) -> str:
    return prediction.strip().rstrip(".").lower()


def _read(path: Path, items: Sequence[EvaluationItem]) -> dict[str, str]:
    return read_answers_by(lambda row: row.text(*ID_FIELDS), path, items, text_fields=SAID)


def _balanced_score(outcome: Outcome) -> float | None:
    return outcome.scored.score if outcome.item.meta["balanced"] else None


def _is_open(outcome: Outcome) -> bool:
    return bool(outcome.item.meta["structural"] == "query")


def _is_binary(outcome: Outcome) -> bool:
    return not _is_open(outcome)


def _consistency_terms(outcomes: Sequence[Outcome]) -> Floats:
    """Of each right question: the accuracy over the others that its answer entails, and 1."""
    scores = {outcome.item.id: outcome.scored.score for outcome in outcomes}
    rows = np.zeros((len(outcomes), 2))
    for row, outcome in zip(rows, outcomes, strict=True):
        entailed = [other for other in outcome.item.meta["entailed"] if other != outcome.item.id and other in scores]
        if outcome.item.meta["balanced"] and outcome.scored.score == 1 and entailed:
            row[:] = np.mean([scores[other] for other in entailed]), 1.0
    return rows


def _cells(outcomes: Sequence[Outcome]) -> dict[tuple[str, str], int]:
    """A column for each answer that is right somewhere in a global group."""
    cells: dict[tuple[str, str], int] = {}
    for outcome in outcomes:
        if (group := outcome.item.meta["global_group"]) is not None and outcome.item.meta["balanced"]:
            cells.setdefault((group, outcome.item.answers[0]), len(cells))
    return cells


def _distribution_terms(cells: Mapping[tuple[str, str], int], outcomes: Sequence[Outcome]) -> Floats:
    """True counts of each cell, then predicted ones. An answer that is never right in its group has no cell."""
    rows = np.zeros((len(outcomes), 2 * len(cells)))
    for row, outcome in zip(rows, outcomes, strict=True):
        if (group := outcome.item.meta["global_group"]) is None or not outcome.item.meta["balanced"]:
            continue
        row[cells[group, outcome.item.answers[0]]] = 1.0
        said = None if outcome.prediction is None else cells.get((group, _parsed(outcome.prediction)))
        if said is not None:
            row[len(cells) + said] = 1.0
    return rows


def distribution(groups: Sequence[str], sums: Floats) -> Floats:
    """How far the answers' distribution is from the true one: chi squared per group, weighted by its questions, / 100.

    Args:
        groups: The group of each of K cells.
        sums: ``[..., 2K]``: true counts, then predicted ones. A cell without a true answer does not count.

    Returns:
        ``[...]``; NaN where there is no question.
    """
    k = len(groups)
    true, predicted = sums[..., :k], sums[..., k:]
    with np.errstate(invalid="ignore", divide="ignore"):
        squares = np.where(true > 0, (predicted - true) ** 2 / true, 0.0)
    names, which = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    member = np.eye(len(names))[which]
    questions = true @ member
    return share(np.stack([((squares @ member) * questions).sum(-1), questions.sum(-1)], axis=-1)) / 100


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    cells = _cells(outcomes)
    metrics = [
        mean_of("accuracy", _balanced_score),
        mean_of("accuracy/binary", _balanced_score, where=_is_binary),
        mean_of("accuracy/open", _balanced_score, where=_is_open),
        Metric(name="consistency", terms=_consistency_terms, combine=share),
        mean_of("validity", lambda outcome: None),
        mean_of("plausibility", lambda outcome: None),
        Metric(
            name="distribution",
            terms=partial(_distribution_terms, cells),
            combine=partial(distribution, [group for group, _ in cells]),
            higher_is_better=False,
        ),
    ]
    for kind in ("structural", "semantic", "words", "steps"):
        metrics += by_kind(f"accuracy/{kind}", outcomes, _kind(kind), values=_balanced_score)
    return metrics


def _kind(name: str) -> Callable[[Outcome], tuple[str, ...]]:
    def kinds(outcome: Outcome) -> tuple[str, ...]:
        value = outcome.item.meta[name]
        return () if value is None else (str(value),)

    return kinds


TASK = Task(
    name="gqa",
    split="testdev_balanced",
    load=_load,
    score=score,
    max_new_tokens=128,
    metrics=_metrics,
    read_predictions=_read,
    counts={"testdev balanced": 12_578},
)
