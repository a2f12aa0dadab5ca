"""The pictures of a cell: opened, corrupted, and named by their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from symphony_vlm.corruptions import corrupt, corruption_rng, image_key
from symphony_vlm.data.images import image_bytes, load_image
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.evaluation.attempts import Failure
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem

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


def open_picture(ref: ImageRef, cell: Cell) -> Picture:
    """Opens a picture and corrupts it as the cell says.

    Raises:
        InputError: it cannot be read.
    """
    key = image_key(image_bytes(ref))
    pixels = np.asarray(load_image(ref))
    if cell.severity:
        rng = corruption_rng(key, cell.corruption, cell.severity, cell.seed)
        pixels = corrupt(pixels, cell.corruption, cell.severity, rng)
    return Picture(key, pixels)


class OpenedPictures:
    """Pictures of a cell's items, each opened and corrupted once, whoever asks for it.

    Args:
        cell: how they are corrupted.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._opened: dict[str, tuple[Picture, ...] | Failure] = {}

    def of(self, item: EvaluationItem) -> tuple[Picture, ...] | Failure:
        """The item's pictures, or why there are none."""
        if item.image_key not in self._opened:
            try:
                self._opened[item.image_key] = tuple(open_picture(ref, self._cell) for ref in item.images)
            except Exception as error:
                self._opened[item.image_key] = Failure.of(error)
        return self._opened[item.image_key]
