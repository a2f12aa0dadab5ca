"""Noise: gaussian_noise, shot_noise, impulse_noise and, outside the fifteen, speckle_noise.

Draws are independent per pixel and channel, so that grey images become coloured.

Sources: hendrycks/robustness, ``make_imagenet_c.py``; imagecorruptions at c959e65 (both Apache-2.0).
"""

from __future__ import annotations

import numpy as np

from symphony_vlm.corruptions.operators import UInt8Image, truncate_unit, unit

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]

_GAUSSIAN_DEVIATION = (0.08, 0.12, 0.18, 0.26, 0.38)
_SHOT_PHOTONS = (60.0, 25.0, 12.0, 5.0, 3.0)
_IMPULSE_SHARE = (0.03, 0.06, 0.09, 0.17, 0.27)
_SPECKLE_DEVIATION = (0.15, 0.20, 0.35, 0.45, 0.60)


def gaussian_noise(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Add normal noise of one deviation (in units of the full range). One draw: ``[H, W, 3]`` normals."""
    noise = rng.standard_normal(image.shape)
    noise *= _GAUSSIAN_DEVIATION[severity - 1]
    noise += unit(image)
    return truncate_unit(noise)


def shot_noise(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Photon counting noise; the table gives the mean count at white. One draw: ``[H, W, 3]`` Poisson counts."""
    photons = _SHOT_PHOTONS[severity - 1]
    return truncate_unit(rng.poisson(unit(image) * photons) / photons)


def impulse_noise(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Replace a share of the values, half by 255 and half by 0. Two draws of ``[H, W, 3]`` uniforms: hit, then salt."""
    hit = rng.random(image.shape) <= _IMPULSE_SHARE[severity - 1]
    salt = rng.random(image.shape) <= 0.5
    return np.where(hit, np.where(salt, np.uint8(255), np.uint8(0)), image)


def speckle_noise(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Multiply each value by one plus normal noise. One draw: ``[H, W, 3]`` normals."""
    x = unit(image)
    noise = rng.standard_normal(image.shape)
    noise *= _SPECKLE_DEVIATION[severity - 1]
    noise *= x
    noise += x
    return truncate_unit(noise)
