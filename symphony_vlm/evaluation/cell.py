"""One cell of an evaluation: a task under one corruption at one severity. Crash-safe, item by item."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from symphony_vlm.data.images import image_bytes, load_image
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.corruptions import corrupt, corruption_rng, image_key
from symphony_vlm.evaluation.opening import AnswersQuestions
from symphony_vlm.evaluation.task import EvaluationItem, Task

__all__ = ["Cell", "read_records", "run_cell"]

IMAGES_AT_ONCE = 64
"""Pictures whose features are held in memory together."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Which task, corruption and severity; severity 0 is clean."""

    task: Task
    corruption: str
    severity: int
    seed: int

    @property
    def file_name(self) -> str:
        """Name of the cell's predictions file."""
        return f"{self.task.name}.{self.corruption}.{self.severity}.jsonl"


@dataclass(frozen=True)
class _Picture:
    sha256: str
    pixels: np.ndarray


def run_cell(
    cell: Cell, items: Sequence[EvaluationItem], predictor: AnswersQuestions, path: Path, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Answers and scores the items that ``path`` does not hold yet; returns the records of all.

    A failing item becomes a record with ``error`` and no score; the others go on.

    Args:
        cell: what is evaluated.
        items: all items of the cell; those of one picture stand together.
        predictor: the model.
        path: one JSON line an item, flushed after each group of pictures.
        advance: called with the number of items done.
    """
    done = {record["item_id"]: record for record in read_records(path)}
    advance(len(done))
    todo = [item for item in items if item.id not in done]
    pictures = [list(group) for _, group in groupby(todo, key=lambda item: item.image_key)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(pictures), IMAGES_AT_ONCE):
            chunk = [item for group in pictures[start : start + IMAGES_AT_ONCE] for item in group]
            for record in _answer(cell, chunk, predictor):
                done[record["item_id"]] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            advance(len(chunk))
    return [done[item.id] for item in items]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a predictions file; a last line torn by a kill is cut off the file."""
    if not path.is_file():
        return []
    records = []
    good_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no line end")
                records.append(json.loads(line))
            except ValueError as error:
                if file.read(1):
                    raise InputError(f"line {number} is not JSON ({error})", where=str(path)) from error
                break
            good_bytes += len(line)
    if good_bytes < path.stat().st_size:
        os.truncate(path, good_bytes)
    return records


def _answer(cell: Cell, items: Sequence[EvaluationItem], predictor: AnswersQuestions) -> list[dict[str, Any]]:
    pictures: dict[str, list[_Picture]] = {}
    errors: dict[str, Exception] = {}
    for item in items:
        if item.image_key not in pictures and item.image_key not in errors:
            try:
                pictures[item.image_key] = [_picture(ref, cell) for ref in item.images]
            except InputError as error:
                errors[item.image_key] = error
    features = _features(pictures, predictor)
    good = [item for item in items if item.image_key in pictures]
    answers = dict(
        zip((i.id for i in good), predictor.answer(good, [features[i.image_key] for i in good]), strict=True)
    )
    return [
        _record(cell, item, answers.get(item.id), pictures.get(item.image_key, []), errors.get(item.image_key))
        for item in items
    ]


def _picture(ref: Any, cell: Cell) -> _Picture:
    key = image_key(image_bytes(ref))
    pixels = np.asarray(load_image(ref))
    if cell.severity:
        rng = corruption_rng(key, cell.corruption, cell.severity, cell.seed)
        pixels = corrupt(pixels, cell.corruption, cell.severity, rng)
    return _Picture(key, pixels)


def _features(pictures: dict[str, list[_Picture]], predictor: AnswersQuestions) -> dict[str, Sequence[Any] | None]:
    """Features of each item's images, all pictures encoded together."""
    flat = [picture.pixels for group in pictures.values() for picture in group]
    if not flat:
        return dict.fromkeys(pictures)
    encoded = predictor.encode_images(flat)
    result: dict[str, Sequence[Any] | None] = {}
    position = 0
    for key, group in pictures.items():
        result[key] = encoded[position : position + len(group)] if group else None
        position += len(group)
    return result


def _record(
    cell: Cell, item: EvaluationItem, prediction: str | None, pictures: list[_Picture], error: Exception | None
) -> dict[str, Any]:
    scored = cell.task.score(prediction, item) if prediction is not None else None
    return {
        "item_id": item.id,
        "task": cell.task.name,
        "split": cell.task.split,
        "image_key": item.image_key,
        "image_sha256": pictures[0].sha256 if pictures else None,
        "pixels_sha256": hashlib.sha256(pictures[0].pixels.tobytes()).hexdigest() if pictures else None,
        "corruption": cell.corruption,
        "severity": cell.severity,
        "seed": cell.seed,
        "group": item.group,
        "question": item.question,
        "prediction": prediction,
        "answer": item.answers[0] if item.answers else None,
        "parsed": scored.parsed if scored else None,
        "parse_status": scored.status if scored else "error",
        # Not known until a judge has been asked, or ever: NaN is no JSON.
        "score": scored.score if scored and not math.isnan(scored.score) else None,
        "lenient": scored.lenient if scored else None,
        "error": {"type": type(error).__name__, "message": str(error)} if error else None,
    }
