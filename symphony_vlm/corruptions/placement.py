"""Where a corruption is applied: on the picture as it is, at a common size, or on what the model sees.

Radii and displacements are in pixels, so the size at which a corruption is applied decides how strong it is.
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from symphony_vlm.corruptions.operators import UInt8Image
from symphony_vlm.errors import InputError

__all__ = ["MODEL_INPUT", "NATIVE", "at_long_side", "long_side_of", "parse_corrupt_at"]

NATIVE, MODEL_INPUT = "native", "model_input"
MAX_LONG_SIDE = 8192


def parse_corrupt_at(text: str) -> str:
    """Checks ``native``, ``model_input`` or ``long_side:N`` and returns it.

    Raises:
        InputError: It is none of these.
    """
    if text in (NATIVE, MODEL_INPUT):
        return text
    match = re.fullmatch(r"long_side:([1-9][0-9]{0,3})", text)
    if match is None or int(match[1]) > MAX_LONG_SIDE:
        raise InputError(
            f"{text!r} is none of native, model_input, long_side:N with N from 1 to {MAX_LONG_SIDE}",
            where="corrupt_at",
            remedy="Write for instance long_side:336.",
        )
    return text


def long_side_of(corrupt_at: str) -> int | None:
    """N of ``long_side:N``, None of the others."""
    return int(corrupt_at.partition(":")[2]) if corrupt_at.startswith("long_side:") else None


def at_long_side(image: UInt8Image, length: int) -> UInt8Image:
    """Resizes an image, up or down, such that its longer side has ``length`` pixels (Pillow, bicubic).

    Args:
        image: uint8 ``[H, W, 3]``.
        length: At least 1; the shorter side keeps the aspect ratio, rounded, and has at least one pixel.
    """
    height, width = image.shape[:2]
    long = max(height, width)
    # In whole numbers, halves up: no machine rounds otherwise.
    scaled = [max(1, (2 * side * length + long) // (2 * long)) for side in (width, height)]
    resized = Image.fromarray(image).resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
    return np.asarray(resized)
