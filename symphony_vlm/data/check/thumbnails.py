"""Small pictures inside the page: it must not need the files beside it."""

from __future__ import annotations

import base64
import io

from PIL import Image

from symphony_vlm.data.images import load_image
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError

__all__ = ["thumbnail"]

_SIDE = 224


def thumbnail(ref: ImageRef) -> str | None:
    """A ``data:`` URL of the picture, at most 224 pixels a side; None if it cannot be read (a fault says why)."""
    try:
        image = load_image(ref)
    except InputError:
        return None
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
