"""Digital: contrast, elastic_transform, pixelate, jpeg_compression; outside the fifteen saturate and elastic_ic.

Sources: hendrycks/robustness, ``make_imagenet_c.py``; imagecorruptions at c959e65 (both Apache-2.0).
"""

from __future__ import annotations

import io
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from symphony_vlm.corruptions.colour import hsv_to_rgb, rgb_to_hsv
from symphony_vlm.corruptions.operators import (
    RealArray,
    UInt8Image,
    gaussian_mirrored,
    truncate_unit,
    uniform,
    unit,
)

__all__ = ["contrast", "elastic_ic", "elastic_transform", "jpeg_compression", "pixelate", "saturate"]


SingleArray = NDArray[np.float32]


class _Elastic(NamedTuple):
    amplitude: float
    deviation: float
    affine_shift: float


class _Saturate(NamedTuple):
    factor: float
    offset: float


_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
# Pixels. The published table is in units of 244, a slip for 224 that became part of the benchmark.
_ELASTIC = (
    _Elastic(488.0, 170.8, 24.4),
    _Elastic(488.0, 19.52, 48.8),
    _Elastic(12.2, 2.44, 4.88),
    _Elastic(17.08, 2.44, 4.88),
    _Elastic(29.28, 2.44, 4.88),
)
_ELASTIC_IC_AMPLITUDE = (12.5, 16.25, 21.25, 25.0, 30.0)
_PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)
_JPEG_QUALITY = (25, 18, 15, 10, 7)
_SATURATE = (_Saturate(0.3, 0.0), _Saturate(0.1, 0.0), _Saturate(2.0, 0.0), _Saturate(5.0, 0.1), _Saturate(20.0, 0.2))


def contrast(image: UInt8Image, severity: int, _rng: np.random.Generator) -> UInt8Image:
    """Pull every channel towards its mean over the image. No draws."""
    x = unit(image)
    mean = x.mean(axis=(0, 1), keepdims=True)
    return truncate_unit((x - mean) * _CONTRAST[severity - 1] + mean)


def elastic_transform(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Random affine map, then a smooth random displacement. Draws: ``[3, 2]``, then ``[H, W]`` for x and for y.

    As in ImageNet-C, whose first severity is in effect the affine map alone.
    """
    amplitude, deviation, affine_shift = _ELASTIC[severity - 1]
    shape = image.shape[:2]
    moved = _random_affine(_single_unit(image), affine_shift, rng)
    dx, dy = (_displacement(uniform(rng, -1.0, 1.0, shape), amplitude, (deviation, deviation)) for _ in range(2))
    return truncate_unit(_displace(moved, dx, dy))


def elastic_ic(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """The variant of imagecorruptions: no affine map, relative sizes. Draws: ``[H, W]`` for x and for y."""
    height, width = image.shape[:2]
    limit = 0.005 * height
    amplitude = _ELASTIC_IC_AMPLITUDE[severity - 1]
    deviations = (0.01 * height, 0.01 * width)
    dx, dy = (_displacement(uniform(rng, -limit, limit, (height, width)), amplitude, deviations) for _ in range(2))
    return truncate_unit(_displace(_single_unit(image), dx, dy))


def _single_unit(image: UInt8Image) -> SingleArray:
    # Single precision, as in the references: interpolating in double and rounding to single leaves flat areas at
    # exactly their level, where double alone would end a hair below it and lose one level to truncation.
    unit: SingleArray = image.astype(np.float32) / np.float32(255.0)
    return unit


def _random_affine(x: SingleArray, shift: float, rng: np.random.Generator) -> SingleArray:
    """Move three points around the centre by up to ``shift`` pixels each and map the image along.

    Equals OpenCV 5 ``warpAffine`` (bilinear, reflect-101) on single precision. The function itself is not used since
    earlier versions round the sampling positions to 1/32 of a pixel, which changes a twelfth of the values.
    """
    height, width = x.shape[:2]
    centre = np.array([width // 2, height // 2])
    extent = max(1, min(height, width) // 3)
    before = (centre + extent * np.array([[1, 1], [1, -1], [-1, -1]])).astype(np.float32)
    after = before + uniform(rng, -shift, shift, (3, 2)).astype(np.float32)
    to_source = cv2.getAffineTransform(after, before)
    row, column = np.arange(float(height))[:, None], np.arange(float(width))[None, :]
    source_column, source_row = (a * column + b * row + c for a, b, c in to_source.tolist())
    return _sample(x, source_row, source_column, repeat_edge=False)


def _displacement(field: RealArray, amplitude: float, deviations: tuple[float, float]) -> SingleArray:
    return (amplitude * gaussian_mirrored(field, deviations)).astype(np.float32)


def _displace(x: SingleArray, dx: SingleArray, dy: SingleArray) -> SingleArray:
    """Read ``x`` at ``(row + dy, column + dx)``; equals scipy ``map_coordinates(order=1, mode="reflect")``."""
    height, width = x.shape[:2]
    row, column = np.arange(float(height))[:, None], np.arange(float(width))[None, :]
    return _sample(x, row + dy, column + dx, repeat_edge=True)


def _sample(x: SingleArray, row: RealArray, column: RealArray, *, repeat_edge: bool) -> SingleArray:
    """Bilinear values of ``x`` (``[H, W, 3]``) at real positions ``[H, W]``, mirrored into the image."""
    height, width = x.shape[:2]
    rows, row_fraction = _mirrored_taps(row, height, repeat_edge)
    columns, column_fraction = _mirrored_taps(column, width, repeat_edge)
    pixels = x.astype(np.float64).reshape(height * width, -1)
    out = np.zeros(x.shape)
    for row_index, row_weight in zip(rows, (1.0 - row_fraction, row_fraction), strict=True):
        for column_index, column_weight in zip(columns, (1.0 - column_fraction, column_fraction), strict=True):
            sampled = np.take(pixels, row_index * width + column_index, axis=0)
            sampled *= (row_weight * column_weight)[..., None]
            out += sampled
    return out.astype(np.float32)


def _mirrored_taps(
    positions: RealArray, length: int, repeat_edge: bool
) -> tuple[tuple[NDArray[np.intp], NDArray[np.intp]], RealArray]:
    """The two indices around each position, mirrored into ``0 .. length - 1``, and the weight of the second.

    ``repeat_edge``: ``d c b a | a b c d`` if true, else ``d c b | a b c d``.
    """
    lower = np.floor(positions)
    index = lower.astype(np.intp)
    last = 2 * length - 1 if repeat_edge else 2 * length - 2

    def mirror(i: NDArray[np.intp]) -> NDArray[np.intp]:
        wrapped = i % (2 * length if repeat_edge else max(1, last))
        return np.minimum(wrapped, last - wrapped)

    return (mirror(index), mirror(index + 1)), positions - lower


def pixelate(image: UInt8Image, severity: int, _rng: np.random.Generator) -> UInt8Image:
    """Shrink by box averaging and enlarge by repeating pixels. No draws."""
    height, width = image.shape[:2]
    factor = _PIXELATE[severity - 1]
    small = Image.fromarray(image).resize(
        (max(1, int(width * factor)), max(1, int(height * factor))), Image.Resampling.BOX
    )
    return np.array(small.resize((width, height), Image.Resampling.NEAREST))


def jpeg_compression(image: UInt8Image, severity: int, _rng: np.random.Generator) -> UInt8Image:
    """Encode as JPEG of low quality with 4:2:0 chroma and decode. No draws; depends on the JPEG library's version."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=_JPEG_QUALITY[severity - 1], subsampling="4:2:0")
    with Image.open(encoded) as decoded:
        return np.array(decoded.convert("RGB"))


def saturate(image: UInt8Image, severity: int, _rng: np.random.Generator) -> UInt8Image:
    """Scale the saturation: severities 1 and 2 remove colour, 3 to 5 add it. No draws."""
    factor, offset = _SATURATE[severity - 1]
    hue, saturation, value = rgb_to_hsv(unit(image))
    return truncate_unit(hsv_to_rgb(hue, np.clip(factor * saturation + offset, 0.0, 1.0), value))
