"""Hexagonal hue-saturation-value space.

The order of operations is that of scikit-image ``rgb2hsv`` and ``hsv2rgb``, which the references call. It matters:
a value that comes back as a whole level or a hair below one is cut to different levels, and in the references a
twentieth of the values of a saturated image falls on the lower side.
"""

from __future__ import annotations

import numpy as np

from symphony_vlm.corruptions.operators import RealArray

__all__ = ["hsv_to_rgb", "rgb_to_hsv"]


def rgb_to_hsv(x: RealArray) -> tuple[RealArray, RealArray, RealArray]:
    """Hue in [0, 1), saturation and value in [0, 1], each ``[H, W]``, of an RGB image ``[H, W, 3]`` in [0, 1].

    Grey has hue 0, i.e. red: raising its saturation from zero makes it red. Black has saturation 0.
    """
    red, green, blue = x[..., 0], x[..., 1], x[..., 2]
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    grey = chroma == 0.0
    divisor = np.where(grey, 1.0, chroma)
    saturation = np.where(grey, 0.0, chroma / np.where(grey, 1.0, value))
    # On a tie for the largest channel, blue wins over green and green over red.
    sixths = np.where(
        blue == value,
        4.0 + (red - green) / divisor,
        np.where(green == value, 2.0 + (blue - red) / divisor, (green - blue) / divisor),
    )
    hue = np.where(grey, 0.0, (sixths / 6.0) % 1.0)
    return hue, saturation, value


def hsv_to_rgb(hue: RealArray, saturation: RealArray, value: RealArray) -> RealArray:
    """Inverse of `rgb_to_hsv`, three ``[H, W]`` to ``[H, W, 3]``."""
    sixths = hue * 6.0
    sector = np.floor(sixths).astype(np.intp)
    fraction = sixths - sector
    low = value * (1.0 - saturation)
    falling = value * (1.0 - fraction * saturation)
    rising = value * (1.0 - (1.0 - fraction) * saturation)
    sector %= 6
    return np.stack(
        [
            np.choose(sector, [value, falling, low, low, rising, value]),
            np.choose(sector, [rising, value, value, falling, low, low]),
            np.choose(sector, [low, low, rising, value, value, falling]),
        ],
        axis=-1,
    )
