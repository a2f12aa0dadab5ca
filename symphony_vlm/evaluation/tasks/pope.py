"""POPE (Li et al. 2023, RUCAIBox/POPE): yes-no questions about objects, in up to three splits.

Two versions of the random split exist: 3,000 questions, and the 2,910 of AoiDragon/POPE e3e39262 that LLaVA-1.5 used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from symphony_vlm.data.fields import shortened
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, ParseStatus, Scored
from symphony_vlm.evaluation.loading import key_of, needed, unique
from symphony_vlm.evaluation.metrics import Metric, lenient_score, mean_of, share
from symphony_vlm.evaluation.predictions import ID_FIELDS, read_answers_by
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.yes_no import SHORT_INSTRUCTION, first_yes_no, pope_answer
from symphony_vlm.evaluation.statistics import Floats
from symphony_vlm.evaluation.task import Task

__all__ = ["TASK"]

SPLITS = ("random", "popular", "adversarial")


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "coco_pope_{random,popular,adversarial}.json, a folder of them, or lmms-lab/POPE")
    files = [data]
    if data.is_dir() and (found := [data / f"coco_pope_{split}.json" for split in SPLITS if _is_file(data, split)]):
        files = found
    items = []
    for file in files:
        named = next((split for split in SPLITS if split in file.stem.lower()), "")
        rows = read_rows(file, split="test")
        items += [_item(row, named, image_folder or (file.parent if file.is_file() else file)) for row in rows]
    return unique(items, data)


def _is_file(folder: Path, split: str) -> bool:
    return (folder / f"coco_pope_{split}.json").is_file()


def _item(row: Row, named: str, folder: Path) -> EvaluationItem:
    label = row.text("label", "answer").strip().lower()
    if label not in ("yes", "no"):
        raise row.error(f"the label is {shortened(label)}; it must be yes or no")
    split = row.text("category") if row.fields.get("category") else named
    question = _question(row.text("text", "question"))
    picture = _picture(row.text("image_source", "image"))
    images = row.images("image", folder=folder)
    return EvaluationItem(
        id="/".join(filter(None, (split, picture, question))),
        question=question + SHORT_INSTRUCTION,
        answers=(label,),
        images=images,
        image_key=key_of(images, picture),
        group=split or None,
        meta={"question_id": row.text("question_id"), "picture": picture, "question": question},
    )


def _question(text: str) -> str:
    """A question without mark and instruction: it is one line."""
    return text.removeprefix("<image>\n").partition("\n")[0].strip()


def _picture(name: str) -> str:
    return PurePosixPath(name).stem


def _score(prediction: str, item: EvaluationItem) -> Scored:
    parsed, lenient = pope_answer(prediction), first_yes_no(prediction)
    return Scored(
        score=float(parsed == item.answers[0]),
        parsed=parsed,
        status=_status(prediction, parsed, lenient),
        lenient=float(lenient == item.answers[0]),
    )


def _status(prediction: str, parsed: str, lenient: str | None) -> ParseStatus:
    """The rule makes yes of anything that is not no: say where the answer did not."""
    if not prediction.strip():
        return "empty"
    if parsed == "no" or lenient == "yes":
        return "ok"
    return "unparsed" if lenient is None else "ambiguous"


def _read(path: Path, items: Sequence[EvaluationItem], questions: Path | None = None) -> dict[str, str]:
    return read_answers_by(_Keys(items), path, items, questions=questions)


class _Keys:
    """Row -> item id: by our own id, by picture and question, or by question_id where ids are unique."""

    def __init__(self, items: Sequence[EvaluationItem]) -> None:
        self._splits = {item.group for item in items}
        self._by_text: dict[tuple[str, str], list[EvaluationItem]] = {}
        self._by_id: dict[str, list[EvaluationItem]] = {}
        for item in items:
            self._by_text.setdefault((item.meta["picture"], item.meta["question"]), []).append(item)
            self._by_id.setdefault(item.meta["question_id"], []).append(item)

    def __call__(self, row: Row) -> str | None:
        if row.fields.get("item_id") is not None:
            return row.text("item_id")
        category = row.text("category") if row.fields.get("category") is not None else None
        if category in SPLITS and None not in self._splits and category not in self._splits:
            return None  # LLaVA's answer file holds all three splits, the annotations perhaps one
        if isinstance(row.fields.get("image"), str):
            question = _question(row.text("question", "prompt"))
            found = self._by_text.get((_picture(row.fields["image"]), question), [])
        else:
            question = row.text(*ID_FIELDS)
            found = self._by_id.get(question, [])
            if len(found) == 1 and "prompt" in row.fields:
                _check_question(row, found[0])
        if category is not None and None not in self._splits:
            found = [item for item in found if item.group == category]
        if len(found) > 1:
            raise row.error(
                f"belongs to any of the splits {', '.join(str(item.group) for item in found)}",
                remedy="Add --questions with LLaVA's question file, or score each split with its own annotation file.",
            )
        return found[0].id if found else question


def _check_question(row: Row, item: EvaluationItem) -> None:
    asked, own = _question(row.text("prompt")), item.meta["question"]
    if asked != own:
        raise row.error(
            f"the question of this id is {shortened(own)}, not {shortened(asked)}",
            remedy="Predictions and annotations are of different versions of POPE.",
        )


def _predicted(outcome: Outcome) -> str:
    """What was answered; the wrong one where there is no answer."""
    if outcome.prediction is None:
        return "no" if outcome.item.answers[0] == "yes" else "yes"
    return outcome.scored.parsed


def _counts(where: Callable[[Outcome], bool]) -> Callable[[Sequence[Outcome]], Floats]:
    """Terms true positive, predicted yes, labelled yes."""

    def terms(outcomes: Sequence[Outcome]) -> Floats:
        rows = np.zeros((len(outcomes), 3))
        for row, outcome in zip(rows, outcomes, strict=True):
            if where(outcome):
                predicted, label = _predicted(outcome) == "yes", outcome.item.answers[0] == "yes"
                row[:] = predicted and label, predicted, label
        return rows

    return terms


def _f1(sums: Floats) -> Floats:
    """``2 tp / (predicted + labelled)``, which is the harmonic mean of precision and recall."""
    return share(np.stack([2 * sums[..., 0], sums[..., 1] + sums[..., 2]], axis=-1))


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    splits = sorted({outcome.item.group for outcome in outcomes if outcome.item.group is not None})
    metrics = _of(lambda outcome: True, "")
    if len(splits) > 1:
        parts = [_counts(_in_split(split)) for split in splits]
        metrics.append(
            Metric(
                name="f1_mean_of_splits",
                terms=lambda outcomes: np.concatenate([part(outcomes) for part in parts], axis=1),
                combine=lambda sums: np.mean([_f1(sums[..., 3 * i : 3 * i + 3]) for i in range(len(parts))], axis=0),
            )
        )
        for split in splits:
            metrics += _of(_in_split(split), f"/{split}")
    return metrics


def _in_split(split: str) -> Callable[[Outcome], bool]:
    return lambda outcome: outcome.item.group == split


def _of(where: Callable[[Outcome], bool], suffix: str) -> list[Metric]:
    terms = _counts(where)

    def metric(name: str, combine: Callable[[Floats], Floats]) -> Metric:
        return Metric(name=name + suffix, terms=terms, combine=combine, where=where)

    return [
        mean_of(f"accuracy{suffix}", where=where),
        metric("precision", lambda sums: share(sums[..., [0, 1]])),
        metric("recall", lambda sums: share(sums[..., [0, 2]])),
        metric("f1", _f1),
        mean_of(f"yes_ratio{suffix}", _said_yes, where=where),
        mean_of(f"accuracy_lenient{suffix}", lenient_score, where=where),
    ]


def _said_yes(outcome: Outcome) -> float | None:
    return None if outcome.prediction is None else float(outcome.scored.parsed == "yes")


TASK = Task(
    name="pope",
    split="test",
    load=_load,
    score=_score,
    max_new_tokens=128,
    metrics=_metrics,
    read_predictions=_read,
    read_with_questions=_read,
    counts={
        "three splits": 9000,
        "three splits, random of AoiDragon/POPE e3e39262": 8910,
        "one split": 3000,
        "random of AoiDragon/POPE e3e39262": 2910,
    },
)
