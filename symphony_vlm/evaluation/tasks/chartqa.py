"""ChartQA, test: questions about charts (Masry et al., arXiv 2203.10244; vis-nlp/ChartQA).

Files: the folder of ``test_human.json`` and ``test_augmented.json`` (``[{imgname, query, label}]``), one of the two, or
lmms-lab/ChartQA. Predictions name their question by our id (``human-0``), by picture and question (``imgname, query``,
or LLaVA's question file), or, for one file, by the place in it. A number may be 5 % off; years too, which is why the
strict figure, equality in lower case, stands beside the official one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from symphony_vlm.evaluation.benchmark_files import SAID, asked_question, join_by_key, picture, short_prompt
from symphony_vlm.evaluation.loading import needed, unique
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of, share
from symphony_vlm.evaluation.predictions import ID_FIELDS, answer_text
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task
from symphony_vlm.evaluation.typed_fields import text_or_none

__all__ = ["TASKS", "is_right"]

SPLITS = ("human", "augmented")
_TOLERANCE = 0.05
_SINGLE_WORD = "\nAnswer the question with a single word."


def is_right(prediction: str, target: str) -> bool:
    """The official rule: 5 % for numbers other than 0, else equality in lower case."""
    predicted, wanted = _to_float(prediction), _to_float(target)
    if predicted is not None and wanted:
        return abs(predicted - wanted) / abs(wanted) <= _TOLERANCE
    return prediction.lower() == target.lower()


def _to_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def score(prediction: str, item: EvaluationItem) -> Scored:
    """The official rule; the ``lenient`` field is not used, since the official rule is the forgiving one."""
    text = prediction.strip()
    return Scored(score=float(is_right(text, item.answers[0])), parsed=text, status="ok" if text else "empty")


def _strict(outcome: Outcome) -> float:
    said = outcome.prediction
    return float(said is not None and said.strip().lower() == outcome.item.answers[0].lower())


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    return _items(data, image_folder, single_word=False)


def _load_single_word(
    data: Path | None, image_folder: Path | None, scratch: Path, seed: int
) -> Sequence[EvaluationItem]:
    return _items(data, image_folder, single_word=True)


def _items(data: Path | None, image_folder: Path | None, *, single_word: bool) -> list[EvaluationItem]:
    data = needed(data, "the folder of test_human.json and test_augmented.json, one of them, or lmms-lab/ChartQA")
    files = [data / f"test_{split}.json" for split in SPLITS if (data / f"test_{split}.json").is_file()]
    items = []
    for file in files or [data]:
        rows = read_rows(file, split=None if file.is_file() else "test")
        items += [_item(row, number, file, image_folder, single_word) for number, row in enumerate(rows)]
    return unique(items, data)


def _item(row: Row, number: int, file: Path, image_folder: Path | None, single_word: bool) -> EvaluationItem:
    named = row.text("type") if row.fields.get("type") else file.stem
    split = next((split for split in SPLITS if split in named.lower()), None)
    name = text_or_none(row, "imgname")
    folder = image_folder or _beside(file)
    images, key = picture(row, file, folder, "image", name=name)
    question = row.text("query", "question")
    own_id = text_or_none(row, "question_id", "id")
    return EvaluationItem(
        id=f"{split or 'test'}-{number}" if own_id is None else own_id,
        question=f"{question}{_SINGLE_WORD}" if single_word else short_prompt(question),
        answers=(_label(row),),
        images=images,
        image_key=key,
        group=split,
        meta={"place": number, "asked": (_stem(name), question.strip().lower())},
    )


def _beside(file: Path) -> Path | None:
    """The official folder has its pictures in ``png/``."""
    folder = file.parent / "png"
    return folder if file.is_file() and folder.is_dir() else None


def _label(row: Row) -> str:
    """The answer; the hub has it as a list of one."""
    value: Any = row.get("label", "answer")
    return str(value[0]) if isinstance(value, list) and len(value) == 1 else row.text("label", "answer")


def _stem(name: object) -> str:
    return PurePosixPath(str(name)).stem if isinstance(name, str) else ""


def _read(path: Path, items: Sequence[EvaluationItem], questions: Path | None = None) -> dict[str, str]:
    keys: dict[Hashable, list[str]] = {}
    for item in items:
        keys.setdefault(item.meta["asked"], []).append(item.id)
    keys.update({item.id: [item.id] for item in items})
    if len({item.group for item in items}) == 1:
        for item in items:
            keys.setdefault(str(item.meta["place"]), [item.id])
    asked = {row.text(*ID_FIELDS): row for row in read_rows(questions)} if questions else {}
    rows = read_rows(path, as_pairs=("question_id", "text"))
    return join_by_key(((row, _key(row, keys, asked), answer_text(row, SAID)) for row in rows), keys)


def _key(row: Row, keys: dict[Hashable, list[str]], asked: dict[str, Row]) -> Hashable:
    if (named := _named_question(row)) is not None:
        return named
    question_id = row.text(*ID_FIELDS)
    if question_id in asked and (named := _named_question(asked[question_id])) is not None:
        return named
    if question_id not in keys and isinstance(row.fields.get("prompt"), str):
        return _stem(question_id), asked_question(row.text("prompt"))
    return question_id


def _named_question(row: Row) -> Hashable | None:
    name = row.fields.get("imgname", row.fields.get("image"))
    question = next((row.fields[field] for field in ("query", "question", "text") if field in row.fields), None)
    if not isinstance(name, str) or not isinstance(question, str):
        return None
    if "query" not in row.fields and "question" not in row.fields and "prompt" in row.fields:
        question = row.text("prompt")  # of an answer line the text is the answer
    return _stem(name), asked_question(question)


def _half_terms(outcomes: Sequence[Outcome]) -> Floats:
    rows = np.zeros((len(outcomes), 4))
    for row, outcome in zip(rows, outcomes, strict=True):
        if outcome.item.group in SPLITS:
            start = 2 * SPLITS.index(outcome.item.group)
            row[start : start + 2] = outcome.scored.score, 1.0
    return rows


def _mean_of_halves(sums: Floats) -> Floats:
    mean: Floats = (share(sums[..., :2]) + share(sums[..., 2:])) / 2
    return mean


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    """``relaxed_accuracy`` is the mean of both halves where both are there."""
    present = [split for split in SPLITS if any(outcome.item.group == split for outcome in outcomes)]
    if len(present) == 2:
        headline = Metric(name="relaxed_accuracy", terms=_half_terms, combine=_mean_of_halves)
    else:
        headline = mean_of("relaxed_accuracy")
    metrics = [headline, mean_of("accuracy_strict", _strict)]
    for split in present:
        metrics.append(mean_of(f"relaxed_accuracy/{split}", where=_in(split)))
        metrics.append(mean_of(f"accuracy_strict/{split}", _strict, where=_in(split)))
    return metrics


def _in(split: str) -> Callable[[Outcome], bool]:
    return lambda outcome: outcome.item.group == split


def _task(name: str, load: Callable[[Path | None, Path | None, Path, int], Sequence[EvaluationItem]]) -> Task:
    return Task(
        name=name,
        split="test",
        load=load,
        score=score,
        max_new_tokens=128,
        metrics=_metrics,
        read_predictions=_read,
        read_with_questions=_read,
        counts={"human and augmented": 2500, "human or augmented": 1250},
    )


TASKS = (_task("chartqa", _load), _task("chartqa_single_word", _load_single_word))
