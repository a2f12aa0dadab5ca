"""The rules by which a decoded image becomes upright 8-bit RGB, the same for training and every evaluation.

* The EXIF orientation is applied: a photo from a phone is seen as its owner sees it.
* Transparency is composited on white: dropping the alpha channel would turn most icons black.
* Grey of 16 bits is scaled to 8: a plain conversion would clip nearly everything to white.
* Colour profiles are ignored, as the vision encoders' own preprocessing ignores them.
"""

from __future__ import annotations

import struct

import numpy as np
from PIL import ExifTags, Image

from symphony_vlm.errors import InputError

__all__ = ["to_upright_rgb", "upright_size"]

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """Apply the rules at the top of this file.

    Returns:
        A new RGB image without metadata, so that nobody can apply the orientation a second time.

    Raises:
        InputError: The pixels are of a type whose range of brightness is not defined.
    """
    rgb = _to_rgb(image)
    transpose = _UPRIGHT.get(_orientation(image))
    upright = rgb if transpose is None else rgb.transpose(transpose)
    upright.info.clear()
    return upright


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of `to_upright_rgb`'s result, of an image that need not be decoded."""
    # Pillow turns TIFF itself, and says so in the size before the pixels are there and in the metadata only after.
    on_its_side = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if on_its_side else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        # Unreadable metadata says nothing about the pixels, which are complete: viewers show such a file as it is.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise InputError(
            "floating-point pixels have no defined range of brightness", remedy="Convert the image to 8 or 16 bits."
        )
    if image.mode.startswith("I"):
        image = _grey_to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255, rounded. Pillow gives some 16-bit files the 32-bit mode ``I``."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise InputError(
            f"grey values run from {low} to {high}; only 8 and 16 bits (0 to 65535) have a defined brightness",
            remedy="Convert the image to 8 or 16 bits.",
        )
    grey = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))
