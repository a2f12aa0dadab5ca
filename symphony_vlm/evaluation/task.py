"""What a benchmark is: items, and a rule that scores a prediction. Pure functions; no model, no files written."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, ParseStatus, Scored
from symphony_vlm.evaluation.metrics import Metric, accuracy_metrics
from symphony_vlm.evaluation.options import Options, options_of
from symphony_vlm.evaluation.predictions import read_answers
from symphony_vlm.text import nearest

__all__ = ["EvaluationItem", "Outcome", "ParseStatus", "Scored", "Task", "get_task", "task_names"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Attributes:
        load: ``(data file or folder or None, image folder or None, folder for generated data, seed) -> items``. The
            images need not be there.
        score: ``(prediction, item) -> Scored``; raw model text in.
        max_new_tokens: longest answer.
        metrics: the figures of a set of outcomes, the headline first.
        read_predictions: ``(file or folder, items) -> {item id: text}``, of the benchmark's own result format and
            LLaVA's answer lines.
        read_with_questions: ``(file, items, question file) -> {item id: text}``, where answer lines name an item only
            by way of LLaVA's question file.
        read_self_contained: ``(file or folder) -> items with their predictions``, of results that bring the truth.
        read_results: ``(file, items) -> items with their predictions``, in place of ``read_predictions`` where the file
            says more of an item than its answer: what a judge made of it, or whether the prompt had OCR tokens.
        options: item -> what ``--scoring likelihood`` compares; None where the answer is written all the same.
        export: outcomes -> the JSON document that a server or a judge takes.
        counts: official numbers of items, by the name of the version; another number makes the result a subset.
        count: what ``counts`` counts, where it is not the items.
    """

    name: str
    split: str
    load: Callable[[Path | None, Path | None, Path, int], Sequence[EvaluationItem]]
    score: Callable[[str, EvaluationItem], Scored]
    max_new_tokens: int = 16
    metrics: Callable[[Sequence[Outcome]], list[Metric]] = accuracy_metrics
    read_predictions: Callable[[Path, Sequence[EvaluationItem]], dict[str, str]] = read_answers
    read_with_questions: Callable[[Path, Sequence[EvaluationItem], Path], dict[str, str]] | None = None
    read_self_contained: Callable[[Path], Sequence[tuple[EvaluationItem, str]]] | None = None
    read_results: Callable[[Path, Sequence[EvaluationItem]], Sequence[tuple[EvaluationItem, str]]] | None = None
    options: Callable[[EvaluationItem], Options | None] = options_of
    export: Callable[[Sequence[Outcome]], object] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    count: Callable[[Sequence[EvaluationItem]], int] = len

    def version(self, items: Sequence[EvaluationItem]) -> str | None:
        """The name of the official version that has as many items; None if there is none."""
        n = self.count(items)
        return next((name for name, official in self.counts.items() if official == n), None)


def _tasks() -> dict[str, Task]:
    """The tasks of every module in the folder ``tasks``: its ``TASK``, or ``TASKS`` where a benchmark has several."""
    from symphony_vlm.evaluation import tasks

    found: dict[str, Task] = {}
    for module in pkgutil.iter_modules(tasks.__path__):
        for task in _of_module(importlib.import_module(f"{tasks.__name__}.{module.name}")):
            found[task.name] = task
    return found


def _of_module(module: ModuleType) -> list[Task]:
    single = getattr(module, "TASK", None)
    return [single] if isinstance(single, Task) else list(getattr(module, "TASKS", ()))


def task_names() -> list[str]:
    """Names of the tasks."""
    return list(_tasks())


def get_task(name: str) -> Task:
    """The task of that name, or the one that a Python file of that path defines as ``TASK``.

    Raises:
        InputError: No such task (names the nearest), or the file defines none.
    """
    if name.endswith(".py"):
        return _task_of_file(Path(name))
    tasks = _tasks()
    if name not in tasks:
        raise InputError(
            f"no task {name!r}{nearest(name, tasks)}",
            where="--task",
            remedy=f"Tasks: {', '.join(tasks)}; or the path of a Python file that defines TASK.",
        )
    return tasks[name]


def _task_of_file(path: Path) -> Task:
    if not path.is_file():
        raise InputError("does not exist", where=f"--task {path}", remedy=f"Relative paths start at {Path.cwd()}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise InputError(
            "defines no TASK", where=f"--task {path}", remedy="Write TASK = Task(name=..., load=..., score=...)."
        )
    return task
