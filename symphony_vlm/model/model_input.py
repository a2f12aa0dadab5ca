"""What a model sees of a picture, as 8-bit pixels, and which of them show the picture rather than padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from symphony_vlm.errors import InputError
from symphony_vlm.model.image_processor import SymphonyImageProcessor

__all__ = ["ModelInput", "check_model_input", "model_input"]

Rectangle = tuple[slice, slice]
"""Rows and columns."""
_WHERE = "corrupt_at model_input"
_REMEDY = "Use native or long_side:N."


@dataclass(frozen=True)
class ModelInput:
    """A picture after the geometric steps (padding, resizing, cropping) and before normalisation."""

    pixels: np.ndarray
    """uint8 ``[size, size, 3]``; preparing it again changes nothing."""
    content: Rectangle
    """Where the picture is."""


def check_model_input(processor: SymphonyImageProcessor, scales: tuple[int, ...]) -> None:
    """Refuses a model that does not see a picture as one square that can be prepared again unchanged.

    Args:
        processor: the model's.
        scales: of its vision tower.

    Raises:
        InputError: it sees tiles or several scales, or its encoder's own preprocessing is no identity on its result.
    """
    if processor.tile_grid is not None or len(scales) > 1:
        how = "in tiles (anyres)" if processor.tile_grid is not None else f"at several scales {list(scales)}"
        raise InputError(f"is not defined for a model that sees pictures {how}", where=_WHERE, remedy=_REMEDY)
    rng = np.random.default_rng(0)
    probe = rng.integers(0, 256, (processor.image_size, processor.image_size, 3)).astype(np.uint8)
    if not np.array_equal(processor.prepare(Image.fromarray(probe)), probe):
        raise InputError(
            f"the encoder's own preprocessing changes pictures of {processor.image_size} x {processor.image_size}, "
            "the size that it makes",
            where=_WHERE,
            remedy=_REMEDY,
        )


def model_input(processor: SymphonyImageProcessor, pixels: np.ndarray) -> ModelInput:
    """The geometric part of preparation; see `check_model_input` for what it takes.

    Args:
        processor: the model's.
        pixels: uint8 ``[H, W, 3]``.
    """
    height, width = pixels.shape[:2]
    settings = _Geometry(processor)
    return ModelInput(processor.prepare(Image.fromarray(pixels)), _content(settings, height, width))


class _Geometry:
    """A processor that equals another one of the same settings, so that rectangles can be kept."""

    def __init__(self, processor: SymphonyImageProcessor) -> None:
        self.processor = processor
        self._name = processor.to_json_string()

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Geometry) and other._name == self._name

    def __hash__(self) -> int:
        return hash(self._name)


@lru_cache(maxsize=256)
def _content(geometry: _Geometry, height: int, width: int) -> Rectangle:
    """The smallest rectangle around the pixels that a picture of this size makes up to one half at least.

    Found by preparing a white and a black picture, which holds for any processor: where the results are equal there is
    padding. Of a strip so thin that it makes up half of no pixel, those count that it makes up most.
    """
    white, black = (Image.new("RGB", (width, height), colour) for colour in ("white", "black"))
    prepare = geometry.processor.prepare
    share = (prepare(white).astype(np.int16) - prepare(black)).max(axis=-1)
    if share.max() <= 0:  # even a white picture leaves no trace
        return slice(0, 0), slice(0, 0)
    mostly = share >= min(128, int(share.max()))
    rows, columns = np.flatnonzero(mostly.any(axis=1)), np.flatnonzero(mostly.any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
