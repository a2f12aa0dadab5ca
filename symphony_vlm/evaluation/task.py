"""What a benchmark is: items, and a rule that scores a prediction. Pure functions; no model, no files written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from symphony_vlm.data.sample import ImagePart, ImageRef, Message, TextPart
from symphony_vlm.errors import InputError
from symphony_vlm.text import nearest

__all__ = ["EvaluationItem", "ParseStatus", "Scored", "Task", "get_task", "task_names"]

ParseStatus = Literal["ok", "ambiguous", "unparsed", "empty", "error"]


@dataclass(frozen=True, kw_only=True)
class EvaluationItem:
    """One question about one set of images."""

    id: str
    question: str
    answers: tuple[str, ...]
    """Accepted answers; the first is the reference."""
    images: tuple[ImageRef, ...] = ()
    image_key: str = ""
    """What items about the same picture share; the unit of resampling."""
    group: str | None = None
    """Question type or source, for the breakdown."""
    choices: tuple[str, ...] = ()
    """Options of a multiple choice, A first."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What the benchmark's metrics need besides: split, category, whether there is an image."""

    @property
    def messages(self) -> list[Message]:
        """The conversation that asks the question: images first, as in training."""
        parts = [ImagePart(index=i) for i in range(len(self.images))]
        text = TextPart(text=f"\n{self.question}" if parts else self.question)
        return [Message(role="user", parts=(*parts, text))]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A prediction's score."""

    score: float
    """0 to 1."""
    parsed: str
    """What the rule made of the prediction."""
    status: ParseStatus = "ok"
    lenient: float | None = None
    """0 to 1 by the benchmark's forgiving rule, where it has one."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Attributes:
        load: ``(data file or folder or None, image folder or None, folder for generated data, seed) -> items``.
        score: ``(prediction, item) -> Scored``; raw model text in.
        max_new_tokens: longest answer.
    """

    name: str
    split: str
    load: Callable[[Path | None, Path | None, Path, int], Sequence[EvaluationItem]]
    score: Callable[[str, EvaluationItem], Scored]
    max_new_tokens: int = 16


def _tasks() -> dict[str, Task]:
    from symphony_vlm.evaluation.tasks import scenes, short_answer

    return {task.name: task for task in (scenes.TASK, short_answer.TASK)}


def task_names() -> list[str]:
    """Names of the tasks."""
    return list(_tasks())


def get_task(name: str) -> Task:
    """The task of that name, else an `InputError` that names the nearest."""
    tasks = _tasks()
    if name not in tasks:
        raise InputError(
            f"no task {name!r}{nearest(name, tasks)}", where="--task", remedy=f"Tasks: {', '.join(tasks)}."
        )
    return tasks[name]
