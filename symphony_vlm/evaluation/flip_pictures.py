"""The pictures of flipped answers, drawn again from the evaluation's data and what its records say.

Nothing is believed: the file must have the recorded sha256, and the clean and the corrupted pixels must have the hashes
that the evaluation noted. Otherwise there is no picture but the reason why.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.item_finder import ItemFinder
from symphony_vlm.evaluation.pictures import open_picture
from symphony_vlm.evaluation.report_data import Evaluation
from symphony_vlm.evaluation.task import get_task

__all__ = ["PicturePair", "find_pictures"]

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


def find_pictures(
    finder: ItemFinder, evaluations: Sequence[Evaluation], clean: Record, corrupted: Record
) -> PicturePair | str:
    """Both pictures of an item, or why there are none.

    Args:
        finder: Finds the item that the records are about.
        evaluations: Folders of the model that answered; the first that still has its data is used.
        clean: The record of the clean cell.
        corrupted: The record of the corrupted cell.
    """
    if not clean.get("image_sha256") or not corrupted.get("pixels_sha256"):
        return "the records name no picture"
    if corrupted.get("attack", "none") != "none":
        return "an attack has changed the pixels; they are not drawn again here"
    reason = "the records name no evaluation"
    for evaluation in evaluations:
        found = finder.items(evaluation, str(clean.get("task")))
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
        small = max(shown[0].shape[:2]) <= _LOSSLESS_PIXELS
        return PicturePair(clean=_data_url(shown[0]), corrupted=_data_url(shown[1]), small=small)
    return reason


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
