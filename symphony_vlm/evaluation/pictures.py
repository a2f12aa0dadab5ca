"""The pictures of a cell: opened, corrupted, and named by their content."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from symphony_vlm.corruptions import corrupt, corruption_rng, image_key
from symphony_vlm.data.images import image_bytes, load_image
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.evaluation.cells import Cell

__all__ = ["Picture", "open_picture"]


@dataclass(frozen=True)
class Picture:
    """What the model is shown."""

    sha256: str
    """Of the encoded file, before any corruption."""
    pixels: np.ndarray
    """uint8 ``[H, W, 3]``."""


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
