"""The image operators that several corruptions share: filters, magnification, fractal noise, colour.

All of them are pure functions of their arguments. Real-valued images are float64 so that truncation to 8 bits at the
end of a corruption falls on the same side as in the reference implementations.

Sources: hendrycks/robustness, ``ImageNet-C/create_c/make_imagenet_c.py`` (arXiv 1903.12261), and
bethgelab/imagecorruptions at c959e65, both Apache-2.0.
"""

from __future__ import annotations

import decimal
import functools
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import scipy.fft
import scipy.ndimage
from numpy.typing import NDArray

__all__ = [
    "RealArray",
    "UInt8Image",
    "exp",
    "gaussian",
    "gaussian_mirrored",
    "gaussian_weights",
    "luma",
    "motion",
    "plasma",
    "power_of_two_at_least",
    "truncate_levels",
    "truncate_unit",
    "uniform",
    "unit",
    "zoom",
    "zoom_sum",
]

UInt8Image = NDArray[np.uint8]
RealArray = NDArray[np.float64]

_LUMA_WEIGHTS = (0.299, 0.587, 0.114)


def unit(image: UInt8Image) -> RealArray:
    """Scale 8-bit values to the unit interval: ``[H, W, 3]`` uint8 to float64 in [0, 1]."""
    return image / 255.0


def truncate_unit(values: NDArray[np.floating[Any]]) -> UInt8Image:
    """Clip to [0, 1] and scale to 8 bits, dropping the fraction."""
    return truncate_levels(np.clip(values, 0.0, 1.0) * 255.0)


def truncate_levels(values: NDArray[np.floating[Any]]) -> UInt8Image:
    """Clip to [0, 255] and drop the fraction.

    Truncation, not rounding, is what both references do; rounding would shift the mean by half a level.
    """
    levels: UInt8Image = np.clip(values, 0.0, 255.0).astype(np.uint8)
    return levels


def uniform(rng: np.random.Generator, low: float, high: float, shape: int | tuple[int, ...]) -> RealArray:
    """Draw ``low + (high - low) * rng.random(shape)``; spelled out because the order of draws is part of the scheme."""
    draws = rng.random(shape)
    draws *= high - low
    draws += low
    return draws


def luma(x: RealArray) -> RealArray:
    """Weighted grey value of an RGB image, ``[H, W, 3]`` to ``[H, W]``."""
    red, green, blue = _LUMA_WEIGHTS
    return red * x[..., 0] + green * x[..., 1] + blue * x[..., 2]


def gaussian(a: RealArray, deviation: float) -> RealArray:
    """Gaussian filter per channel with replicated edges, cut off at four deviations.

    Args:
        a: ``[H, W]`` or ``[H, W, 3]``.
        deviation: Standard deviation in pixels.
    """
    # scipy, not OpenCV: the two differ in the last bit, which on a white page decides between 255 and 254. This is
    # scipy's gaussian_filter, but for its weights, which are numpy's and so depend on the processor.
    weights = gaussian_weights(deviation, int(4.0 * deviation + 0.5))
    rows = scipy.ndimage.correlate1d(a, weights, axis=0, mode="nearest")
    return np.asarray(scipy.ndimage.correlate1d(rows, weights, axis=1, mode="nearest"), dtype=np.float64)


@functools.lru_cache(maxsize=32)
def gaussian_weights(deviation: float, radius: int) -> RealArray:
    """Weights of sum 1 at offsets ``-radius .. radius``, read-only."""
    offsets = np.arange(-radius, radius + 1, dtype=np.float64)
    weights = exp(-0.5 / (deviation * deviation) * offsets**2)
    weights /= weights.sum()
    weights.setflags(write=False)
    return weights


def exp(exponents: NDArray[np.floating[Any]]) -> RealArray:
    """The exponential, correctly rounded, of some dozens of numbers.

    numpy's differs in the last bit between processors (with AVX-512 and without), and with it a few pixels.
    """
    with decimal.localcontext(decimal.Context(prec=40)):
        return np.array([float(decimal.Decimal(value).exp()) for value in exponents.tolist()])


def gaussian_mirrored(a: RealArray, deviations: tuple[float, float]) -> RealArray:
    """Gaussian filter with mirrored edges (``d c b a | a b c d``), cut off at three deviations.

    The half-sample mirror makes the discrete cosine transform diagonalise the filter, so that the 1,025 taps of
    elastic_transform at severity 1 cost no more than seven. Equal to scipy ``gaussian_filter(mode="reflect",
    truncate=3)`` to about 1e-15 of the range.

    Args:
        a: ``[H, W]``.
        deviations: Standard deviations in pixels along height and width.
    """
    spectrum = scipy.fft.dctn(a, type=2)
    spectrum *= _cosine_response(a.shape[0], deviations[0])[:, None]
    spectrum *= _cosine_response(a.shape[1], deviations[1])[None, :]
    return np.asarray(scipy.fft.idctn(spectrum, type=2), dtype=np.float64)


@functools.lru_cache(maxsize=32)
def _cosine_response(length: int, deviation: float) -> RealArray:
    """Factor by which the Gaussian cut off at three deviations scales each of ``length`` cosine modes, read-only."""
    radius = int(3.0 * deviation + 0.5)
    offsets = np.arange(1, radius + 1)
    weights = np.exp(-0.5 * (offsets / deviation) ** 2)
    modes = np.pi / length * np.arange(length)
    response = (1.0 + 2.0 * (np.cos(np.outer(modes, offsets)) * weights).sum(axis=1)) / (1.0 + 2.0 * weights.sum())
    response.setflags(write=False)
    return np.asarray(response)


def motion(a: RealArray, radius: int, deviation: float, angle: float) -> RealArray:
    """One-sided motion blur along a line with replicated edges; it also moves the image by some pixels.

    Args:
        a: ``[H, W]`` or ``[H, W, 3]``.
        radius: The line has ``2 * radius + 1`` taps, one pixel apart.
        deviation: Deviation of the half Gaussian of weights, in pixels.
        angle: Direction in degrees; 0 looks to the right, 90 down.
    """
    steps = np.arange(2 * radius + 1)
    # The factor of the density cancels, but not in the last bit, which decides between 255 and 254 on a white page.
    weights = exp(-(steps**2) / (2.0 * deviation**2)) / (math.sqrt(2.0 * math.pi) * deviation)
    weights /= weights.sum()
    rows = np.ceil(steps * math.sin(math.radians(angle)) - 0.5).astype(int)
    columns = np.ceil(steps * math.cos(math.radians(angle)) - 0.5).astype(int)
    top, left = max(0, -int(rows.min())), max(0, -int(columns.min()))
    bottom, right = max(0, int(rows.max())), max(0, int(columns.max()))
    padded = cv2.copyMakeBorder(a, top, bottom, left, right, cv2.BORDER_REPLICATE)

    height, width = a.shape[:2]
    out = np.zeros_like(a)
    product = np.empty_like(a)
    for row, column, weight in zip((rows + top).tolist(), (columns + left).tolist(), weights, strict=True):
        np.multiply(padded[row : row + height, column : column + width], weight, out=product)
        out += product
    return out


def zoom(a: RealArray, factor: float) -> RealArray:
    """Magnify the centre of an image to its full size (corner-aligned bilinear, as scipy ``zoom`` of order 1).

    Args:
        a: ``[H, W]`` or ``[H, W, C]``.
        factor: Magnification, at least 1.
    """
    return zoom_sum(a, [factor])


def zoom_sum(a: RealArray, factors: Sequence[float]) -> RealArray:
    """Sum of ``zoom(a, factor)`` over several factors.

    Rows are interpolated first, so that the inner loop runs over whole rows of memory, and the two terms of each
    interpolation are accumulated in place.
    """
    height, width = a.shape[:2]
    channels = (1,) * (a.ndim - 2)
    total = np.zeros_like(a)
    for factor in factors:
        lower, upper, fraction = _zoom_taps(height, factor)
        rows = _interpolate(a, lower, upper, fraction.reshape(-1, 1, *channels), axis=0)
        lower, upper, fraction = _zoom_taps(width, factor)
        total += _interpolate(rows, lower, upper, fraction.reshape(1, -1, *channels), axis=1)
    return total


def _interpolate(a: RealArray, lower: NDArray[Any], upper: NDArray[Any], fraction: RealArray, axis: int) -> RealArray:
    out = np.take(a, lower, axis=axis)
    out *= 1.0 - fraction
    above = np.take(a, upper, axis=axis)
    above *= fraction
    out += above
    return out


def _zoom_taps(length: int, factor: float) -> tuple[NDArray[np.intp], NDArray[np.intp], RealArray]:
    """Where each of ``length`` magnified positions reads: lower index, upper index, weight of the upper."""
    crop = math.ceil(length / factor)
    enlarged = round(crop * factor)
    assert enlarged >= length, (length, factor)
    first = (enlarged - length) // 2
    step = (crop - 1) / (enlarged - 1) if enlarged > 1 else 0.0
    positions = np.minimum(np.arange(first, first + length) * step, crop - 1)
    lower = np.floor(positions).astype(np.intp)
    upper = np.minimum(lower + 1, crop - 1)
    start = (length - crop) // 2
    return lower + start, upper + start, positions - lower


def power_of_two_at_least(length: int) -> int:
    """The smallest power of two that is at least ``length`` and at least 2."""
    return 1 << (max(length, 2) - 1).bit_length()


def plasma(rng: np.random.Generator, size: int, decay: float) -> NDArray[np.float32]:
    """Fractal noise on a torus by the diamond-square scheme.

    Args:
        rng: One array is drawn per kind of midpoint and level: square centres, then the midpoints of horizontal and
            of vertical sides.
        size: Side of the torus, a power of two.
        decay: Division of the amplitude parameter per level; larger is smoother. The amplitude is its square.

    Returns:
        ``[size, size]`` in [0, 1], both ends attained.
    """
    assert size >= 2 and size & (size - 1) == 0, size

    def midpoints(sum_of_four: RealArray, wobble: float) -> RealArray:
        return sum_of_four / 4.0 + wobble * uniform(rng, -wobble, wobble, sum_of_four.shape)

    field = np.zeros((size, size))
    step, wobble = size, 100.0
    while step >= 2:
        half = step // 2
        corners, centres = field[::step, ::step], field[half::step, half::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        field[half::step, half::step] = midpoints(pairs + np.roll(pairs, -1, axis=1), wobble)
        vertical = centres + np.roll(centres, 1, axis=0)
        field[::step, half::step] = midpoints(vertical + corners + np.roll(corners, -1, axis=1), wobble)
        horizontal = centres + np.roll(centres, 1, axis=1)
        field[half::step, ::step] = midpoints(horizontal + corners + np.roll(corners, -1, axis=0), wobble)
        step, wobble = half, wobble / decay
    field -= field.min()
    field /= field.max()
    return field.astype(np.float32)
