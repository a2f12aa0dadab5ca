"""Warnings while a stage trains: to the console and to ``<stage>/warnings.jsonl``, once per cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from symphony_vlm.training.callbacks import cut_log

__all__ = ["StageWarnings"]


class StageWarnings:
    """Gives each warning once, and again only after a while.

    Args:
        path: a file of JSON lines.
        report: gets the text of each.
        repeat_steps: after how many steps a warning of the same kind about the same layer is given again.
        silent: for all processes but the first.
    """

    def __init__(self, path: Path, report: Callable[[str], None], *, repeat_steps: int, silent: bool = False) -> None:
        self._path = path
        self._report = report
        self._repeat_steps = repeat_steps
        self._silent = silent
        self._last: dict[tuple[str, str | None], int] = {}

    def begin(self, step: int) -> None:
        """Goes on from a step: what an interrupted run said after it is taken back, what it said before is known."""
        if self._silent:
            return
        cut_log(self._path, lambda entry: entry["step"] <= step)
        lines = self._path.read_text().splitlines() if self._path.is_file() else []
        self._last = {(entry["kind"], entry["layer"]): entry["step"] for entry in map(json.loads, lines)}

    def give(self, kind: str, step: int, message: str, remedy: str, *, layer: str | None = None, **values: Any) -> None:
        """Warns, unless that was done not long ago.

        Args:
            kind: names the cause for programs, e.g. ``collapsed_router``.
            step: the optimizer step.
            message: what is wrong, a sentence.
            remedy: what to try, a sentence.
            layer: the layer at fault.
            values: figures for the file.
        """
        last = self._last.get((kind, layer))
        if self._silent or (last is not None and step - last < self._repeat_steps):
            return
        self._last[kind, layer] = step
        self._report(f"warning at step {step}: {message} {remedy}")
        entry = {"step": step, "kind": kind, "layer": layer, "message": message, "remedy": remedy, **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
