"""The pictures of a cell: opened, corrupted, and named by their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from symphony_vlm.corruptions import image_key
from symphony_vlm.corruptions.placement import MODEL_INPUT
from symphony_vlm.data.images import image_bytes, load_image
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.evaluation.attempts import Failure
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.placement import placed

__all__ = ["OpenedPictures", "Picture", "open_picture"]


@dataclass(frozen=True)
class Picture:
    """What the model is shown."""

    sha256: str
    """Of the encoded file, before any corruption."""
    pixels: np.ndarray
    """uint8 ``[H, W, 3]``."""

    @cached_property
    def pixels_sha256(self) -> str:
        """Of the pixels' bytes."""
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()


def open_picture(ref: ImageRef, cell: Cell, model: object = None) -> Picture:
    """Opens a picture and corrupts it as the cell says, and where it says.

    Args:
        ref: the picture.
        cell: what it is opened for.
        model: needed for ``model_input`` (`placement.SeesSquares`).

    Raises:
        InputError: it cannot be read, or ``model_input`` is not defined for the model.
    """
    key = image_key(image_bytes(ref))
    pixels = placed(
        np.asarray(load_image(ref)),
        key,
        model,
        corruption=cell.corruption,
        severity=cell.severity,
        seed=cell.seed,
        corrupt_at=cell.corrupt_at,
    )
    return Picture(key, pixels)


class OpenedPictures:
    """Pictures of a cell's items, each opened and corrupted once, whoever asks for it.

    Args:
        cell: how they are corrupted.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._opened: dict[tuple[str, object], tuple[Picture, ...] | Failure] = {}

    def of(self, item: EvaluationItem, model: object = None) -> tuple[Picture, ...] | Failure:
        """The item's pictures, or why there are none.

        Args:
            item: whose.
            model: who will see them; each has pictures of its own where it decides what is corrupted.
        """
        key = item.image_key, model if self._cell.corrupt_at == MODEL_INPUT else None
        if key not in self._opened:
            try:
                self._opened[key] = tuple(open_picture(ref, self._cell, model) for ref in item.images)
            except Exception as error:
                self._opened[key] = Failure.of(error)
        return self._opened[key]
