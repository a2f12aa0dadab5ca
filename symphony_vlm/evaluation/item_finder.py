"""The questions of a finished evaluation, loaded again: for their pictures and for figures that need all of an item."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.report_data import Evaluation
from symphony_vlm.evaluation.task import get_task, task_names

__all__ = ["ItemFinder"]


@dataclass(kw_only=True)
class ItemFinder:
    """Loads a task's items as the evaluation did, each task of a folder once; nothing is loaded before it is asked for.

    Args:
        data: Where the benchmark's data is, if not where the evaluation found it.
        image_folder: Base of the records' image paths, if not what it was.
    """

    data: Path | None = None
    image_folder: Path | None = None
    _loaded: dict[tuple[Path, str], Mapping[str, EvaluationItem] | str] = field(default_factory=dict)
    _scratch: tempfile.TemporaryDirectory[str] | None = None

    def items(self, evaluation: Evaluation, task: str) -> Mapping[str, EvaluationItem] | str:
        """Items by id, or why they cannot be had. Their pictures need not be there."""
        key = (evaluation.folder, task)
        if key not in self._loaded:
            try:
                self._loaded[key] = self._load(evaluation, task)
            except InputError as error:
                self._loaded[key] = f"its data cannot be read ({error.problem})"
        return self._loaded[key]

    def _load(self, evaluation: Evaluation, name: str) -> Mapping[str, EvaluationItem] | str:
        # A name out of a file must not run a file: only the tasks that come with the package.
        if name not in task_names():
            return f"{name} is a task of your own, whose file is not run here"
        provenance = evaluation.document.get("provenance")
        told = provenance if isinstance(provenance, dict) else {}
        data = self.data or (Path(told["data"]) if told.get("data") else None)
        if data is None and name != "scenes":
            return "the evaluation does not say where its data was (name it: --data)"
        if self.data is None and data is not None and not data.exists():
            return f"{data} is not on this machine (say where it is: --data)"
        folder = evaluation.manifest.get("image_folder")
        image_folder = self.image_folder or (Path(folder) if folder else None)
        seed = evaluation.manifest.get("seed")
        items = get_task(name).load(data, image_folder, self._generated(evaluation), seed if seed is not None else 0)
        return {item.id: item for item in items}

    def _generated(self, evaluation: Evaluation) -> Path:
        """Where data that the evaluation has generated lies; it is generated again elsewhere if it is gone."""
        if (evaluation.folder / "data").is_dir():
            return evaluation.folder / "data"
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory()
        return Path(self._scratch.name)

    def __enter__(self) -> ItemFinder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes what was generated."""
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None
