"""RealWorldQA (xAI 2024): questions about photographs, each with its own instruction, which is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from symphony_vlm.evaluation.item import EvaluationItem, Scored
from symphony_vlm.evaluation.loading import key_of, needed, unique
from symphony_vlm.evaluation.rows import Row, read_rows
from symphony_vlm.evaluation.rules.letters import lenient_letter, split_options
from symphony_vlm.evaluation.task import Task

__all__ = ["TASK"]


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    data = needed(data, "a table with question, answer, image, or lmms-lab/RealWorldQA")
    rows = read_rows(data, split="test")
    return unique((_item(row, number, image_folder) for number, row in enumerate(rows)), data)


def _item(row: Row, number: int, image_folder: Path | None) -> EvaluationItem:
    question, answer = row.text("question"), row.text("answer").strip()
    item_id = row.text("question_id", "id") if {"question_id", "id"} & set(row.fields) else str(number)
    images = row.images("image", folder=image_folder)
    is_letter = answer in tuple("ABCD")
    return EvaluationItem(
        id=item_id,
        question=question,
        answers=(answer,),
        images=images,
        image_key=key_of(images, item_id),
        group="multiple choice" if is_letter else "open",
        choices=split_options(question) if is_letter else (),
        meta={"letter": is_letter},
    )


def _normalized(text: str) -> str:
    return text.lower().strip().rstrip(".")


def _score(prediction: str, item: EvaluationItem) -> Scored:
    if not prediction.strip():
        return Scored(score=0.0, parsed="", status="empty")
    if not item.meta["letter"]:
        parsed = _normalized(prediction)
        return Scored(score=float(parsed == _normalized(item.answers[0])), parsed=parsed)
    # Options that could not be told apart in the question still have their letters.
    letter = lenient_letter(prediction, item.choices or ("", "", "", ""))
    if letter is None:
        return Scored(score=0.0, parsed="", status="unparsed")
    return Scored(score=float(letter == item.answers[0]), parsed=letter)


TASK = Task(name="realworldqa", split="test", load=_load, score=_score, max_new_tokens=128, counts={"test": 765})
