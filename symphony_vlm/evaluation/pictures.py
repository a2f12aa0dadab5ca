"""The pictures of a cell: opened, corrupted, and named by their content."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from symphony_vlm.corruptions import image_key
from symphony_vlm.data.images import image_bytes, load_image
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.placement import placed

__all__ = ["Picture", "open_picture"]


@dataclass(frozen=True)
class Picture:
    """What the model is shown."""

    sha256: str
    """Of the encoded file, before any corruption."""
    pixels: np.ndarray
    """uint8 ``[H, W, 3]``."""


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
