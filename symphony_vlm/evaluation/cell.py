"""One cell of an evaluation: a task under one corruption at one severity. Crash-safe, item by item."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor

from symphony_vlm.evaluation.answer import Answer
from symphony_vlm.evaluation.attacks.answering import answer_attacked
from symphony_vlm.evaluation.attacks.attack import Attack
from symphony_vlm.evaluation.attempts import Failure, attempt
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.pictures import OpenedPictures, Picture
from symphony_vlm.evaluation.predictor import AnswersItems
from symphony_vlm.evaluation.processes import ALONE, Processes
from symphony_vlm.evaluation.prompts import order_by_picture
from symphony_vlm.evaluation.records import Record, RecordWriter, merge_records, part_path, read_records
from symphony_vlm.evaluation.task import EvaluationItem

__all__ = ["IMAGES_AT_ONCE", "Respondent", "answer_items", "run_cell", "run_cell_together"]

IMAGES_AT_ONCE = 64
"""Pictures that are held in memory together."""


@dataclass(frozen=True)
class _Asked:
    """An item with its pictures, and what the model made of them, or why it could not."""

    item: EvaluationItem
    pictures: tuple[Picture, ...] = ()
    features: Sequence[Any] | None = None
    failure: Failure | None = None

    @property
    def length(self) -> int:
        """Grows with the length of the prompt."""
        images = self.features or ()
        return len(self.item.question) + sum(len(image) if isinstance(image, Tensor) else 1 for image in images)


@dataclass(frozen=True, kw_only=True)
class Respondent:
    """A model that answers a cell's questions, and where its answers go."""

    predictor: AnswersItems
    path: Path
    """One JSON line an item."""


def run_cell(
    cell: Cell,
    items: Sequence[EvaluationItem],
    predictor: AnswersItems,
    path: Path,
    advance: Callable[[int], None],
    *,
    batch_size: int = 64,
    processes: Processes = ALONE,
    attack: Attack | None = None,
) -> list[Record]:
    """`run_cell_together` for one model; returns its records."""
    respondents = [Respondent(predictor=predictor, path=path)]
    (records,) = run_cell_together(
        cell, items, respondents, advance, batch_size=batch_size, processes=processes, attack=attack
    )
    return records


def run_cell_together(
    cell: Cell,
    items: Sequence[EvaluationItem],
    respondents: Sequence[Respondent],
    advance: Callable[[int], None],
    *,
    batch_size: int = 64,
    processes: Processes = ALONE,
    already: Callable[[int], None] | None = None,
    after_chunk: Callable[[], None] = lambda: None,
    attack: Attack | None = None,
) -> list[list[Record]]:
    """Answers and scores the items that files do not hold yet; returns the records of all, by model.

    Each picture is opened and corrupted once for all models and questions, a chunk of pictures at a time. A failing
    item becomes a record with ``error`` and no score; the others go on. One process appends to a model's ``path``
    itself, several each to a part beside it; `merge_records` makes one sorted file of them.

    Args:
        cell: what is evaluated.
        items: all items of the cell; those of one picture stand together.
        respondents: the models; each continues where its own file ends.
        advance: called with the number of answers that this process has added, over all models.
        batch_size: questions answered together; halved where the device's memory is too small.
        processes: who takes part; each answers the pictures that it owns.
        already: called with the number of this process's answers that files hold; default: `advance`.
        after_chunk: called when no model needs a chunk's pictures any more.
        attack: the one that the cell names, prepared for its task; it applies to all items.

    Returns:
        For each model its records in the order of the items; nothing in processes other than the first.
    """
    mine = [item for item in items if processes.owns(item)]
    done = [{record["item_id"] for record in read_records(one.path)} for one in respondents]
    (already or advance)(sum(item.id in answered for answered in done for item in mine))
    todo = [item for item in mine if any(item.id not in answered for answered in done)]
    pictures = [list(group) for _, group in groupby(todo, key=lambda item: _picture_key(item, attack))]
    with ExitStack() as files:
        answering = [
            (
                _Batches(cell, one.predictor, batch_size, processes.rank, attack),
                files.enter_context(RecordWriter(_own_path(one.path, processes))),
                answered,
            )
            for one, answered in zip(respondents, done, strict=True)
        ]
        for start in range(0, len(pictures), IMAGES_AT_ONCE):
            chunk = [item for group in pictures[start : start + IMAGES_AT_ONCE] for item in group]
            opened = OpenedPictures(cell)
            for batches, writer, answered in answering:
                for records in batches.records([item for item in chunk if item.id not in answered], opened):
                    writer.write(records)
                    advance(len(records))
            after_chunk()
    processes.barrier()
    if not processes.first:
        return [[] for _ in respondents]
    merged = [merge_records(one.path) for one in respondents]
    return [[records[item.id] for item in items] for records in merged]


def _own_path(path: Path, processes: Processes) -> Path:
    return path if processes.size == 1 else part_path(path, processes.rank)


def answer_items(
    cell: Cell,
    items: Sequence[EvaluationItem],
    predictor: AnswersItems,
    *,
    batch_size: int,
    opened: OpenedPictures | None = None,
) -> dict[str, Record]:
    """Records by item id, written nowhere; arguments as of `run_cell`, and pictures that have been opened before."""
    batches = _Batches(cell, predictor, batch_size, rank=0)
    found = batches.records(items, opened or OpenedPictures(cell))
    return {record["item_id"]: record for records in found for record in records}


class _Batches:
    """Answers chunks of items in batches that fit the device's memory."""

    def __init__(
        self, cell: Cell, predictor: AnswersItems, batch_size: int, rank: int, attack: Attack | None = None
    ) -> None:
        self._cell = cell
        self._predictor = predictor
        self._attack = attack
        most = attack.items_at_once if attack else None
        self._batch_size = batch_size if most is None else min(batch_size, most)
        self._rank = rank

    def records(self, items: Sequence[EvaluationItem], opened: OpenedPictures) -> Iterator[list[Record]]:
        """Batch by batch, those that failed before the model was asked first."""
        start = time.monotonic()
        asked = self._encode(items, opened)
        encoding = (time.monotonic() - start) / max(len(items), 1)
        failed = [one for one in asked if one.failure is not None]
        if failed:
            yield [self._record(one, one.failure, encoding) for one in failed]
        good = [one for one in asked if one.failure is None]
        order = order_by_picture([one.item.image_key for one in good], [one.length for one in good])
        good = [good[i] for i in order]
        while good:
            batch, good = good[: self._batch_size], good[self._batch_size :]
            start = time.monotonic()
            answers = attempt(self._answer, batch, self._too_large)
            seconds = encoding + (time.monotonic() - start) / len(batch)
            yield [self._record(one, answer, seconds) for one, answer in zip(batch, answers, strict=True)]

    def _encode(self, items: Sequence[EvaluationItem], opened: OpenedPictures) -> list[_Asked]:
        """Encodes the pictures of all items together, each once."""
        keys = [_picture_key(item, self._attack) for item in items]
        shown: dict[str, tuple[Picture, ...] | Failure] = {}
        for key, item in zip(keys, items, strict=True):
            if key not in shown:
                shown[key] = self._shown(item, opened)
        good = {key: pictures for key, pictures in shown.items() if not isinstance(pictures, Failure)}
        flat = [picture.pixels for pictures in good.values() for picture in pictures]
        encoded = iter(attempt(self._predictor.encode_images, flat))
        features = {key: [next(encoded) for _ in pictures] for key, pictures in good.items()}
        return [self._asked(i, shown[key], features.get(key, [])) for i, key in zip(items, keys, strict=True)]

    def _shown(self, item: EvaluationItem, opened: OpenedPictures) -> tuple[Picture, ...] | Failure:
        pictures = opened.of(item, self._predictor)
        if self._attack is None or isinstance(pictures, Failure):
            return pictures
        try:
            return self._attack.shown(item, pictures, self._cell.seed)
        except Exception as error:
            return Failure.of(error)

    def _asked(self, item: EvaluationItem, pictures: tuple[Picture, ...] | Failure, features: Sequence[Any]) -> _Asked:
        if isinstance(pictures, Failure):
            return _Asked(item, failure=pictures)
        failure = next((image for image in features if isinstance(image, Failure)), None)
        if failure is not None:
            return _Asked(item, pictures, failure=failure)
        return _Asked(item, pictures, features=features or None)

    def _answer(self, batch: Sequence[_Asked]) -> Sequence[str]:
        if self._attack is not None:
            return answer_attacked(self._attack, self._cell, self._predictor, batch, at_once=self._batch_size)
        return self._predictor.answer([one.item for one in batch], [one.features for one in batch])

    def _too_large(self, size: int) -> None:
        self._batch_size = max(1, min(self._batch_size, size // 2))

    def _record(self, asked: _Asked, answer: str | Failure | None, seconds: float) -> Record:
        when_and_where = {"seconds": round(seconds, 4), "rank": self._rank}
        return _record(self._cell, asked.item, answer, asked.pictures) | when_and_where


def _picture_key(item: EvaluationItem, attack: Attack | None) -> str:
    """What items share that are shown the same pictures."""
    return item.id if attack is not None and attack.own_pictures else item.image_key


def _record(cell: Cell, item: EvaluationItem, answer: str | Failure | None, pictures: Sequence[Picture]) -> Record:
    failure, prediction = (answer, None) if isinstance(answer, Failure) else (None, answer)
    scored = cell.task.score(prediction, item) if prediction is not None else None
    facts = {"prompt_sha256": None, "n_prompt_tokens": None, "n_new_tokens": None, "stop_reason": None}
    return {
        "item_id": item.id,
        "question_id": item.id,
        "task": cell.task.name,
        "split": cell.task.split,
        "image_key": item.image_key,
        "image_sha256": pictures[0].sha256 if pictures else None,
        "pixels_sha256": pictures[0].pixels_sha256 if pictures else None,
        "corruption": cell.corruption,
        "severity": cell.severity,
        "seed": cell.seed,
        "corrupt_at": cell.corrupt_at,
        "attack": cell.attack,
        "group": item.group,
        "question": item.question,
        "prediction": None if prediction is None else str(prediction),
        "answer": item.answers[0] if item.answers else None,
        "parsed": scored.parsed if scored else None,
        "parse_status": scored.status if scored else "error",
        # Not known until a judge has been asked, or ever: NaN is no JSON.
        "score": scored.score if scored and not math.isnan(scored.score) else None,
        "lenient": scored.lenient if scored else None,
        "error": {"type": failure.type, "message": failure.message} if failure else None,
        **facts,
        **(prediction.facts if isinstance(prediction, Answer) else {}),
    }
