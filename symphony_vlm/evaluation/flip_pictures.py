"""The pictures of flipped answers, drawn again from the evaluation's data and what its records say.

Nothing is believed: the file must have the recorded sha256, and the clean and the corrupted pixels must have the hashes
that the evaluation noted. Otherwise there is no picture but the reason why.
"""

from __future__ import annotations

import base64
import hashlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.pictures import open_picture
from symphony_vlm.evaluation.report_data import Evaluation
from symphony_vlm.evaluation.task import get_task, task_names

__all__ = ["PictureFinder", "PicturePair"]

Record = Mapping[str, Any]

_SHOWN_PIXELS = 256
"""Long side of what the page holds."""
_LOSSLESS_PIXELS = 128
"""Up to this side pictures are stored as they are: a scene of 64 pixels would suffer most."""


@dataclass(frozen=True, kw_only=True)
class PicturePair:
    """What the model was shown, as data URLs."""

    clean: str
    corrupted: str
    small: bool
    """Whether the pixels are few enough to be shown as squares."""


@dataclass(kw_only=True)
class PictureFinder:
    """Finds the pictures of records.

    Args:
        data: Where the benchmark's data is, if not where the evaluation found it.
        image_folder: Base of the records' image paths, if not what it was.
    """

    data: Path | None = None
    image_folder: Path | None = None
    _tasks: dict[tuple[Path, str], dict[str, EvaluationItem] | str] = field(default_factory=dict)
    _scratch: tempfile.TemporaryDirectory[str] | None = None

    def find(self, evaluations: Sequence[Evaluation], clean: Record, corrupted: Record) -> PicturePair | str:
        """Both pictures of an item, or why there are none.

        Args:
            evaluations: Folders of the model that answered; the first that still has its data is used.
            clean: The record of the clean cell.
            corrupted: The record of the corrupted cell.
        """
        if not clean.get("image_sha256") or not corrupted.get("pixels_sha256"):
            return "the records name no picture"
        if corrupted.get("attack", "none") != "none":
            return "an attack has changed the pixels; they are not drawn again here"
        reason = "the records name no task"
        for evaluation in evaluations:
            found = self._items(evaluation, str(clean.get("task")))
            if isinstance(found, str):
                reason = found
                continue
            item = found.get(str(clean["item_id"]))
            if item is None or not item.images:
                reason = "the data does not have this question any more"
                continue
            try:
                shown = [_shown(str(clean["task"]), item, record) for record in (clean, corrupted)]
            except InputError as error:
                reason = f"{error.where}: {error.problem}" if error.where else error.problem
                continue
            return PicturePair(
                clean=_data_url(shown[0]),
                corrupted=_data_url(shown[1]),
                small=max(shown[0].shape[:2]) <= _LOSSLESS_PIXELS,
            )
        return reason

    def __enter__(self) -> PictureFinder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes what was generated."""
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _items(self, evaluation: Evaluation, name: str) -> dict[str, EvaluationItem] | str:
        key = (evaluation.folder, name)
        if key not in self._tasks:
            try:
                self._tasks[key] = self._load(evaluation, name)
            except InputError as error:
                self._tasks[key] = f"its data cannot be read ({error.problem})"
        return self._tasks[key]

    def _load(self, evaluation: Evaluation, name: str) -> dict[str, EvaluationItem] | str:
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


def _shown(task: str, item: EvaluationItem, record: Record) -> np.ndarray:
    """The pixels of a record, uint8 ``[H, W, 3]``.

    Raises:
        InputError: The file or the pixels are not those of the evaluation.
    """
    cell = Cell(
        task=get_task(task),
        corruption=str(record["corruption"]),
        severity=int(record["severity"]),
        seed=int(record.get("seed") or 0),
        corrupt_at=str(record.get("corrupt_at") or "native"),
    )
    picture = open_picture(item.images[0], cell)
    if picture.sha256 != record.get("image_sha256"):
        raise InputError("the picture file has changed since the evaluation")
    if hashlib.sha256(picture.pixels.tobytes()).hexdigest() != record.get("pixels_sha256"):
        raise InputError("drawn again, the picture has other pixels than the evaluation showed")
    return picture.pixels


def _data_url(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    lossless = max(image.size) <= _LOSSLESS_PIXELS
    image.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=lossless, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
