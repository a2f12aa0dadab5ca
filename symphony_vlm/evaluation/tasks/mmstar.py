"""MMStar (Chen et al. 2024, MMStar-Benchmark/MMStar): six categories of 250 questions that need their picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from symphony_vlm.data.fields import shortened
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.loading import key_of, needed, unique
from symphony_vlm.evaluation.metrics import Metric, group_accuracies, lenient_score, mean_of
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.letters import LETTER_INSTRUCTION, lenient_letter, split_options, strict_letter
from symphony_vlm.evaluation.task import Task

__all__ = ["TASK", "mmstar_letter"]

_STARTS = (("(", 1), ("option ", 7), ("the answer is ", 14))


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "MMStar's table (.tsv, .jsonl, .parquet) or Lin-Chen/MMStar")
    rows = read_rows(data, split="val")
    return unique((_item(row, image_folder) for row in rows), data)


def _item(row: Row, image_folder: Path | None) -> EvaluationItem:
    index, answer, question = row.text("index"), row.text("answer").strip(), row.text("question")
    if answer not in tuple("ABCD"):
        raise row.error(f"the answer is {shortened(answer)}; it must be one of A, B, C and D")
    images = row.images("image", folder=image_folder)
    return EvaluationItem(
        id=index,
        question=question + LETTER_INSTRUCTION,
        answers=(answer,),
        images=images,
        image_key=key_of(images, index),
        group=row.text("category"),
        choices=split_options(question),
        meta={"l2_category": row.fields.get("l2_category")},
    )


def mmstar_letter(text: str) -> str | None:
    """The letter a to d in one of the places where the official rule looks for the right one; else None.

    A place is character 0, or what follows ``(``, ``option `` or ``the answer is `` at the start. So ``A man`` is A.
    """
    text = text.lower().strip().replace("\n", " ")
    place = next((place for start, place in _STARTS if text.startswith(start)), 0)
    # No start begins with a letter a to d, so at most one place can hold one.
    found = text[place : place + 1]
    return found if found in tuple("abcd") else None


def _score(prediction: str, item: EvaluationItem) -> Scored:
    if not prediction.strip():
        return Scored(score=0.0, parsed="", status="empty", lenient=0.0)
    letter = mmstar_letter(prediction)
    right = float(letter == item.answers[0].lower())
    lenient = float(lenient_letter(prediction, item.choices) == item.answers[0]) if item.choices else right
    parsed = letter.upper() if letter else ""
    return Scored(score=right, parsed=parsed, status="ok" if letter else "unparsed", lenient=lenient)


def _is_letter(outcome: Outcome) -> float:
    """Whether the answer is the right letter and nothing else."""
    return float(outcome.prediction is not None and strict_letter(outcome.prediction, 4) == outcome.item.answers[0])


def _metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    return [
        mean_of("accuracy"),
        mean_of("accuracy_strict", _is_letter),
        mean_of("accuracy_lenient", lenient_score),
        *group_accuracies(outcomes),
        *group_accuracies(outcomes, lambda outcome: outcome.item.meta["l2_category"], prefix="accuracy/l2"),
    ]


def _self_contained(path: Path) -> list[tuple[EvaluationItem, str]]:
    rows = read_rows(path)
    items = unique((_item(row, None) for row in rows), path)
    return [(item, row.text("prediction")) for item, row in zip(items, rows, strict=True)]


TASK = Task(
    name="mmstar",
    split="val",
    load=_load,
    score=_score,
    max_new_tokens=128,
    metrics=_metrics,
    read_self_contained=_self_contained,
    counts={"val": 1500},
)
