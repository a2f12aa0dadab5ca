"""Weather: snow, frost, fog, brightness; outside the fifteen spatter, and the stand-in frost_procedural.

Sources: hendrycks/robustness, ``make_imagenet_c.py``; imagecorruptions at c959e65 (both Apache-2.0).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import cv2
import numpy as np

from symphony_vlm.corruptions.colour import hsv_to_rgb, rgb_to_hsv
from symphony_vlm.corruptions.frost_textures import covering_texture
from symphony_vlm.corruptions.operators import (
    RealArray,
    UInt8Image,
    gaussian,
    luma,
    motion,
    plasma,
    power_of_two_at_least,
    truncate_levels,
    truncate_unit,
    unit,
    zoom,
)

__all__ = ["brightness", "fog", "frost", "frost_procedural", "snow", "spatter"]


class _Snow(NamedTuple):
    mean: float
    deviation: float
    zoom: float
    threshold: float
    motion_radius: int
    motion_deviation: float
    keep: float


class _Frost(NamedTuple):
    image_weight: float
    texture_weight: float


class _Fog(NamedTuple):
    amount: float
    decay: float


class _Spatter(NamedTuple):
    mean: float
    deviation: float
    blur: float
    threshold: float
    strength: float
    """Opacity of water; for mud the deviation, in pixels, that softens the edges."""
    kind: Literal["water", "mud"]


_SNOW = (
    _Snow(0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    _Snow(0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    _Snow(0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    _Snow(0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    _Snow(0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
_FROST = (_Frost(1, 0.4), _Frost(0.8, 0.6), _Frost(0.7, 0.7), _Frost(0.65, 0.7), _Frost(0.6, 0.75))
_FOG = (_Fog(1.5, 2), _Fog(2, 2), _Fog(2.5, 1.7), _Fog(2.5, 1.5), _Fog(3, 1.4))
_BRIGHTNESS_GAIN = (0.1, 0.2, 0.3, 0.4, 0.5)
_SPATTER = (
    _Spatter(0.65, 0.3, 4, 0.69, 0.6, "water"),
    _Spatter(0.65, 0.3, 3, 0.68, 0.6, "water"),
    _Spatter(0.65, 0.3, 2, 0.68, 0.5, "water"),
    _Spatter(0.65, 0.3, 1, 0.65, 1.5, "mud"),
    _Spatter(0.67, 0.4, 1, 0.65, 1.5, "mud"),
)
_WATER_COLOUR = np.array([175, 238, 238]) / 255
_MUD_COLOUR = np.array([63, 42, 20]) / 255
_WATER_EDGE_KERNEL = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
_ICE_TINT = np.array([0.92, 0.97, 1.0])
# The references draw from the first five of the six textures; textures 2 and 3 have the same pixels.
_FROST_CHOICES = 5


def snow(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Two opposite layers of streaked flakes on a whitened image. Draws: ``[H, W]`` normals, then the angle."""
    p = _SNOW[severity - 1]
    x = unit(image)
    flakes = zoom(p.mean + p.deviation * rng.standard_normal(x.shape[:2]), p.zoom)
    flakes[flakes < p.threshold] = 0.0
    angle = -135.0 + 90.0 * rng.random()
    streaks = motion(np.clip(flakes, 0.0, 1.0), p.motion_radius, p.motion_deviation, angle)
    # The references pass the layer through 8 bits, here by rounding.
    layer = (np.round(streaks * 255.0) / 255.0)[..., None]
    whitened = np.maximum(x, luma(x)[..., None] * 1.5 + 0.5)
    return truncate_unit(p.keep * x + (1.0 - p.keep) * whitened + layer + layer[::-1, ::-1])


def frost(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Add a crop of a photographed frost texture. Draws: texture, crop row, crop column.

    Raises:
        InputError: The texture files are not there (see `find_frost_textures`).
    """
    height, width = image.shape[:2]
    texture = covering_texture(int(rng.integers(0, _FROST_CHOICES)), height, width)
    top = int(rng.integers(0, texture.shape[0] - height))
    left = int(rng.integers(0, texture.shape[1] - width))
    return _blend_frost(image, texture[top : top + height, left : left + width], severity)


def frost_procedural(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Add fractal ice, a stand-in that needs no files; its results are never reported as frost. Draws: the plasma."""
    height, width = image.shape[:2]
    ice = plasma(rng, power_of_two_at_least(max(height, width)), decay=1.7).astype(np.float64) ** 1.5
    opacity = np.clip(0.35 + 0.65 * gaussian(ice, 1.0)[:height, :width, None], 0.0, 1.0)
    return _blend_frost(image, 255.0 * opacity * _ICE_TINT, severity)


def _blend_frost(image: UInt8Image, texture: RealArray | UInt8Image, severity: int) -> UInt8Image:
    image_weight, texture_weight = _FROST[severity - 1]
    # In 0..255, not in the unit interval: many of these sums are whole numbers, and truncation would fall elsewhere.
    blend = image_weight * image.astype(np.float64)
    blend += texture_weight * texture
    return truncate_levels(blend)


def fog(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Add a crop of fractal fog and rescale to the old maximum. Draws: the plasma."""
    amount, decay = _FOG[severity - 1]
    x = unit(image)
    height, width = image.shape[:2]
    haze = plasma(rng, power_of_two_at_least(max(height, width)), decay)[:height, :width, None]
    peak = float(x.max())
    x += amount * haze.astype(np.float64)
    x *= peak
    x /= peak + amount
    return truncate_unit(x)


def brightness(image: UInt8Image, severity: int, _rng: np.random.Generator) -> UInt8Image:
    """Raise the value in hue-saturation-value space. No draws."""
    hue, saturation, value = rgb_to_hsv(unit(image))
    return truncate_unit(hsv_to_rgb(hue, saturation, np.minimum(value + _BRIGHTNESS_GAIN[severity - 1], 1.0)))


def spatter(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Drops of water (severities 1 to 3) or mud (4 and 5). One draw: ``[H, W]`` normals."""
    p = _SPATTER[severity - 1]
    x = unit(image)
    liquid = gaussian(p.mean + p.deviation * rng.standard_normal(x.shape[:2]), p.blur)
    liquid[liquid < p.threshold] = 0.0
    if p.kind == "water":
        mask = p.strength * _water_mask(liquid)[..., None]
        return truncate_unit(x + mask * _WATER_COLOUR)
    mask = gaussian((liquid > p.threshold).astype(np.float64), p.strength)[..., None]
    mask[mask < 0.8] = 0.0
    return truncate_unit(x * (1.0 - mask) + mask * _MUD_COLOUR)


def _water_mask(liquid: RealArray) -> RealArray:
    """Opacity of the drops, ``[H, W]`` in [0, 1]: thick near their edges, lit from one side."""
    # The clip only matters for images of a few pixels, where blurring leaves values above one that would wrap around.
    level = np.minimum(255.0 * liquid, 255.0).astype(np.uint8)
    distance = cv2.distanceTransform(255 - cv2.Canny(level, 50, 150), cv2.DIST_L2, 5)
    smooth = cv2.blur(np.minimum(distance, 20.0), (3, 3)).astype(np.uint8)
    relief = cv2.filter2D(cv2.equalizeHist(smooth), cv2.CV_8U, _WATER_EDGE_KERNEL)
    opacity = level * cv2.blur(relief, (3, 3)).astype(np.float64)
    peak = float(opacity.max())
    # Without a drop the reference divides zero by zero.
    return opacity / peak if peak > 0.0 else np.zeros_like(opacity)
