"""Where on a picture the square lies that the vision encoder saw of it, so that patches can be drawn in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from symphony_vlm.model.image_processor import SymphonyImageProcessor

__all__ = ["Region", "seen_region"]

Region = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the picture; outside of it where the square has padding."""

_RAMP_SIDE = 1024


def seen_region(processor: SymphonyImageProcessor, size: tuple[int, int]) -> Region | None:
    """The part of a picture that fills the encoder's square; with ``anyres`` that of the overview.

    Args:
        processor: of the model.
        size: height and width of the picture in pixels.

    Returns:
        The region, or None where an encoder's own preparation gives pixels that no stretched window of the picture
        gives.
    """
    height, width = size
    if processor.resize_mode in ("stretch", "anyres"):
        return 0.0, 0.0, float(width), float(height)
    if processor.resize_mode == "pad":
        side = max(size)
        left, top = (side - width) // 2, (side - height) // 2
        return float(-left), float(-top), float(side - left), float(side - top)
    return _measured(processor, size)


def _measured(processor: SymphonyImageProcessor, size: tuple[int, int]) -> Region | None:
    """For crops, by whatever rule: a picture that holds its own coordinates is prepared, and these are read.

    Of a large picture a smaller one of the same shape is taken; the centre of a crop then moves by less than a pixel of
    the encoder's square.
    """
    height, width = size
    shrink = min(1.0, _RAMP_SIDE / min(size))
    small_height, small_width = max(1, round(height * shrink)), max(1, round(width * shrink))
    across = _axis(processor, small_width, small_height, horizontal=True)
    down = _axis(processor, small_width, small_height, horizontal=False)
    if across is None or down is None:
        return None
    scale_x, scale_y = width / small_width, height / small_height
    return across[0] * scale_x, down[0] * scale_y, across[1] * scale_x, down[1] * scale_y


def _axis(
    processor: SymphonyImageProcessor, width: int, height: int, *, horizontal: bool
) -> tuple[float, float] | None:
    """First and last coordinate of the square along one axis, by a straight line through what its pixels hold."""
    length = width if horizontal else height
    # 16 bits of the coordinate in two channels would not survive the resizing; 8 do, and the line averages them.
    ramp = np.rint(255 * (np.arange(length) + 0.5) / length).astype(np.uint8)
    plane = np.broadcast_to(ramp[None, :] if horizontal else ramp[:, None], (height, width))
    # The third channel tells the picture from the padding.
    pixels = np.stack([plane, plane, np.full_like(plane, 255)], axis=-1)
    square = np.asarray(processor.to_square(Image.fromarray(pixels))).astype(float)
    inside, axis = square[..., 2] > 250, 0 if horizontal else 1
    counts = inside.sum(axis)
    line = (square[..., 0] * inside).sum(axis) / np.maximum(counts, 1)
    # The resizing filter bends the ramp at its ends.
    usable = np.flatnonzero((counts > 0) & (line > 4) & (line < 251))
    if len(usable) < 2:
        return None
    slope, start = np.polyfit(usable + 0.5, line[usable], 1)
    if slope <= 0:
        return None
    return float(start / 255 * length), float((start + slope * len(line)) / 255 * length)
