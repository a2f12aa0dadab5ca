"""Any data set of questions with short answers: LLaVA JSON or JSONL, or parquet with image, question, answer.

Rule: equal after `normalize` (the rule of GQA's and RealWorldQA's scorers: strip, lower case, final period removed,
white space collapsed). Every answer of a conversation with several turns is one item, asked on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from symphony_vlm.data.datasets import open_samples
from symphony_vlm.data.images import image_key
from symphony_vlm.data.sample import Sample
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.task import EvaluationItem, Scored, Task

__all__ = ["TASK", "load_items", "normalize", "score"]


def normalize(text: str) -> str:
    """Lower case, white space collapsed, final periods removed."""
    return " ".join(text.lower().split()).rstrip(".").strip()


def score(prediction: str, item: EvaluationItem) -> Scored:
    """1 if the prediction equals one of the accepted answers after `normalize`."""
    parsed = normalize(prediction)
    if not parsed:
        return Scored(score=0.0, parsed="", status="empty")
    return Scored(score=float(parsed in {normalize(answer) for answer in item.answers}), parsed=parsed)


def load_items(data: Path, image_folder: Path | None) -> list[EvaluationItem]:
    """Every question of a data file.

    Raises:
        InputError: the file or a record cannot be used.
    """
    items: list[EvaluationItem] = []
    source = open_samples(data, image_folder=image_folder)
    ids: set[str] = set()
    for sample in source:
        for item in _items_of(sample):
            if item.id in ids:
                raise InputError(
                    f"the id {item.id!r} stands twice", where=sample.origin, remedy="Give records unique ids."
                )
            ids.add(item.id)
            items.append(item)
    return items


def _items_of(sample: Sample) -> list[EvaluationItem]:
    pairs = [
        (question, answer)
        for question, answer in zip(sample.messages, sample.messages[1:], strict=False)
        if question.role == "user" and answer.role == "assistant"
    ]
    group = sample.meta.get("type") or sample.meta.get("source")
    more = sample.meta.get("answers")
    key = "+".join(image_key(ref) for ref in sample.images) or f"id:{sample.id}"
    return [
        EvaluationItem(
            id=sample.id if len(pairs) == 1 else f"{sample.id}#{turn}",
            question=question.text.strip("\n"),
            answers=tuple(map(str, more)) if isinstance(more, list) and more else (answer.text,),
            images=sample.images,
            image_key=key,
            group=str(group) if group is not None else None,
        )
        for turn, (question, answer) in enumerate(pairs)
    ]


def _load(data: Path | None, image_folder: Path | None, scratch: Path, seed: int) -> Sequence[EvaluationItem]:
    if data is None:
        raise InputError("this task needs a data file", where="--data", remedy="Give LLaVA JSON, JSONL or parquet.")
    return load_items(data, image_folder)


TASK = Task(name="short_answer", split="data", load=_load, score=score)
