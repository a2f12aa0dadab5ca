"""How far an evaluation is: a bar on a terminal, else a line a cell; both with rate and time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from symphony_vlm.evaluation.cells import Cell

__all__ = ["EvaluationProgress"]


class EvaluationProgress:
    """Counts the answers of one process over all cells and models.

    Args:
        console: where it is shown.
        name: what is being done.
        total: answers to give.
        silent: show nothing, as processes other than the first.
    """

    def __init__(self, console: Console, name: str, total: int, *, silent: bool) -> None:
        self._console = console
        self._silent = silent
        self._total = total
        self._kept = 0
        self._answered = 0
        self._start = time.monotonic()
        columns = ("[bold]{task.description}", BarColumn(), MofNCompleteColumn(), "questions", "{task.fields[pace]}")
        self._bar = Progress(
            *(TextColumn(column) if isinstance(column, str) else column for column in columns),
            console=console,
            disable=silent or not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=total, pace="")

    def already(self, answers: int) -> None:
        """So many are there from an earlier start; they say nothing about the pace of this one."""
        self._kept += answers
        self._show()

    def advance(self, answers: int) -> None:
        """So many more have been given."""
        self._answered += answers
        self._show()

    def cell(self, label: str, cell: Cell, row: Mapping[str, Any]) -> None:
        """A cell's headline, as a line where there is no bar."""
        if self._silent or self._console.is_terminal:
            return
        score, low, high = row["value"], row["ci_low"], row["ci_high"]
        shown = "no score" if score is None else f"{score:.3f} [{low:.3f}, {high:.3f}]"
        done = self._kept + self._answered
        attack = "" if cell.attack == "none" else f" {cell.attack}"
        where = f"{label}{cell.task.name} {cell.corruption} {cell.severity}{attack}"
        self._console.print(f"{where}: {shown}  ({done}/{self._total}{', ' if self.pace else ''}{self.pace})")

    @property
    def pace(self) -> str:
        """Rate and time left; empty until something has been answered."""
        if not self._answered:
            return ""
        rate = self._answered / max(time.monotonic() - self._start, 1e-9)
        left = (self._total - self._kept - self._answered) / rate
        return f"{rate:.3g} questions/s, {left:.0f} s left"

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._kept + self._answered, pace=self.pace)

    def __enter__(self) -> EvaluationProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
