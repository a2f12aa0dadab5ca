"""Hashes of corrupted pixels, to see whether an installation makes those that others have made.

The pictures are computed from whole numbers alone, so they are the same everywhere. On large areas of one tone, as a
page has them, the last bit of a filter's weights decides a level, so one picture is a page. ``pixel_manifest.json``
beside this file holds the hashes and the versions that made them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import scipy
from PIL import features

from symphony_vlm.corruptions.catalogue import corrupt
from symphony_vlm.corruptions.operators import UInt8Image
from symphony_vlm.corruptions.randomness import canary, corruption_rng, image_key

__all__ = ["PixelDifference", "committed_manifest", "generated_pictures", "pixel_differences", "pixel_manifest"]

SEED = 0
_DIGITS = 16
_FILE = Path(__file__).with_name("pixel_manifest.json")


@dataclass(frozen=True)
class PixelDifference:
    """A corrupted picture whose pixels are not those of the manifest."""

    picture: str
    corruption: str
    severity: int


def generated_pictures() -> dict[str, UInt8Image]:
    """By name (kind, height x width) uint8 ``[H, W, 3]``: a pattern in several sizes, and a page."""
    patterns = {
        f"pattern {height}x{width}": _pattern(height, width) for height, width in ((1, 1), (17, 31), (224, 336))
    }
    return patterns | {"page 160x224": _page(160, 224)}


def _pattern(height: int, width: int) -> UInt8Image:
    """Ramps in red and green, squares in blue, and a fine texture over them."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    red = np.abs((9 * x) % 510 - 255)
    green = np.abs((7 * y + 2 * x) % 510 - 255)
    blue = np.where((x // 28 + y // 28) % 2 == 1, 255, 32)
    texture = (x * 73 + y * 151 + (x * y) % 89) % 41 - 20
    return np.clip(np.stack([red, green, blue], axis=-1) + texture[..., None], 0, 255).astype(np.uint8)


def _page(height: int, width: int) -> UInt8Image:
    """White, with lines of black strokes and bars of flat colours."""
    page = np.full((height, width, 3), 255, np.uint8)
    for line in range(8, height // 2, 12):
        for stroke in range(10, width - 10, 5):
            if (stroke * 7 + line * 3) % 11 > 3:
                page[line : line + 4 + stroke % 4, stroke : stroke + 2] = 0
    for number, colour in enumerate(((31, 119, 180), (255, 127, 14), (128, 128, 128), (0, 0, 0))):
        left = 20 + 48 * number
        page[height - 14 - 15 * (number + 1) : height - 14, left : left + 32] = colour
    return page


def pixel_manifest(names: Iterable[str]) -> dict[str, Any]:
    """The manifest of this installation.

    Args:
        names: Corruptions; ``frost`` needs its textures.

    Returns:
        ``versions`` of the libraries, ``canary`` of the draws, and ``pictures``: by picture the clean one's hash and by
        corruption those of severities 1 to 5 (the first 16 digits of each sha256), separated by spaces.
    """
    chosen = list(names)
    pictures: dict[str, dict[str, str]] = {}
    for title, picture in generated_pictures().items():
        rows = {name: " ".join(_hash(pixels) for pixels in _severities(picture, name)) for name in chosen}
        pictures[title] = {"clean": _hash(picture), **rows}
    return {"versions": _versions(), "canary": canary(), "pictures": pictures}


def committed_manifest() -> dict[str, Any]:
    """The manifest that comes with this package."""
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def pixel_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[PixelDifference]:
    """Where two manifests differ, over the corruptions that the first one has; severity 0 is the clean picture."""
    differences = []
    for picture, rows in found["pictures"].items():
        for name, row in rows.items():
            first = 0 if name == "clean" else 1
            hashes = zip(row.split(), wanted["pictures"][picture][name].split(), strict=True)
            differences += [
                PixelDifference(picture, name, severity) for severity, (a, b) in enumerate(hashes, first) if a != b
            ]
    return differences


def _severities(picture: UInt8Image, name: str) -> Iterator[UInt8Image]:
    key = image_key(picture)
    for severity in range(1, 6):
        yield corrupt(picture, name, severity, corruption_rng(key, name, severity, SEED))


def _hash(pixels: UInt8Image) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:_DIGITS]


def _versions() -> dict[str, str]:
    libjpeg = features.version("libjpeg_turbo") or features.version("jpg")
    return {
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        "pillow": PIL.__version__,
        "scipy": scipy.__version__,
        "libjpeg": str(libjpeg),
    }
