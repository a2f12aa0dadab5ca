"""Blur: defocus_blur, glass_blur, motion_blur, zoom_blur and, outside the fifteen, gaussian_blur.

Radii and deviations are in pixels of the image that is corrupted.

Sources: hendrycks/robustness, ``make_imagenet_c.py``; imagecorruptions at c959e65 (both Apache-2.0).
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
import scipy.ndimage
from numpy.typing import NDArray

from symphony_vlm.corruptions.operators import (
    UInt8Image,
    gaussian,
    gaussian_weights,
    motion,
    truncate_levels,
    truncate_unit,
    unit,
    zoom_sum,
)

__all__ = ["defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur"]


class _Defocus(NamedTuple):
    radius: int
    edge_deviation: float


class _Glass(NamedTuple):
    deviation: float
    reach: int
    passes: int


class _Motion(NamedTuple):
    radius: int
    deviation: float


_DEFOCUS = (_Defocus(3, 0.1), _Defocus(4, 0.5), _Defocus(6, 0.5), _Defocus(8, 0.5), _Defocus(10, 0.5))
_GLASS = (_Glass(0.7, 1, 2), _Glass(0.9, 2, 1), _Glass(1.0, 2, 3), _Glass(1.1, 3, 2), _Glass(1.5, 4, 2))
_MOTION = (_Motion(10, 3.0), _Motion(15, 5.0), _Motion(15, 8.0), _Motion(15, 12.0), _Motion(20, 15.0))
_GAUSSIAN_DEVIATION = (1.0, 2.0, 3.0, 4.0, 6.0)
# The published calls, kept because their rounding decides both how many factors there are (1.11 is one of them) and
# where ceil(length / factor) falls.
_ZOOM_FACTORS = (
    np.arange(1, 1.11, 0.01),
    np.arange(1, 1.16, 0.01),
    np.arange(1, 1.21, 0.02),
    np.arange(1, 1.26, 0.02),
    np.arange(1, 1.31, 0.03),
)


def defocus_blur(image: UInt8Image, severity: int, _rng: np.random.Generator) -> UInt8Image:
    """Convolve with a disc whose edge is slightly softened. No draws."""
    kernel = defocus_kernel(severity)
    return truncate_unit(
        np.asarray(cv2.filter2D(unit(image), -1, kernel, borderType=cv2.BORDER_REFLECT_101), np.float64)
    )


def defocus_kernel(severity: int) -> NDArray[np.float32]:
    """The softened disc, ``[17, 17]`` (``[21, 21]`` for severity 5).

    Its sum is 1.013 and 1.011 at severities 4 and 5: where the disc touches the border of the window, mirroring counts
    some of it twice. The references do not renormalise, so neither do we.
    """
    radius, edge_deviation = _DEFOCUS[severity - 1]
    half = max(8, radius)
    reach = 1 if radius <= 8 else 2
    offsets = np.arange(-half, half + 1)
    disc = (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2).astype(np.float32)
    disc /= disc.sum()
    # OpenCV's GaussianBlur to the last bit but one: in single precision that one depends on the processor.
    weights = gaussian_weights(edge_deviation, reach)
    softened = disc.astype(np.float64)
    for axis in (0, 1):
        softened = scipy.ndimage.correlate1d(softened, weights, axis=axis, mode="mirror")
    return softened.astype(np.float32)


def glass_blur(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Blur, displace pixels locally, blur again. Per pass two draws: all dx, then all dy, in scan order."""
    deviation, reach, passes = _GLASS[severity - 1]
    height, width, channels = image.shape
    blurred = truncate_unit(gaussian(unit(image), deviation))
    source = np.arange(height * width)
    for _ in range(passes):
        shape = (max(0, height - 2 * reach), max(0, width - 2 * reach))
        dx = rng.integers(-reach, reach, shape)
        dy = rng.integers(-reach, reach, shape)
        if dx.size:
            source = source[displacement_sources(height, width, dx, dy)]
    displaced = blurred.reshape(-1, channels)[source].reshape(image.shape)
    return truncate_unit(gaussian(unit(displaced), deviation))


def displacement_sources(height: int, width: int, dx: NDArray[np.int64], dy: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which old pixel each pixel holds after one displacement pass of glass_blur.

    The reference scans the pixels further than ``reach`` from the edge from bottom right to top left and sets
    ``y[h, w] = y[h + dy, w + dx]`` in place (it writes a swap, which on array views is a copy). A pixel that copies
    from one visited earlier receives that one's *new* value, so the pass is a forest of pointers, each leading to a
    pixel whose old value is read. Doubling the pointers until nothing changes takes about log2 of the longest chain
    steps and equals the loop exactly.

    Args:
        height: Rows of the image.
        width: Columns of the image.
        dx: Horizontal displacements in scan order, ``[height - 2 reach, width - 2 reach]``, in pixels; row 0 belongs
            to image row ``height - reach``, column 0 to image column ``width - reach``.
        dy: Vertical displacements, likewise.

    Returns:
        Flat index of the source of every pixel, ``[height * width]``.
    """
    reach = (height - dx.shape[0]) // 2
    identity = np.arange(height * width).reshape(height, width)
    region = (slice(reach + 1, height - reach + 1), slice(reach + 1, width - reach + 1))

    target = identity.copy()
    target[region] += dy[::-1, ::-1] * width + dx[::-1, ::-1]
    visited = np.zeros((height, width), dtype=bool)
    visited[region] = True
    # Visited before means: inside the region and later in memory, since the scan runs backwards.
    reads_new = visited.reshape(-1)[target] & (target > identity)
    pointer = np.where(reads_new, target, identity).reshape(-1)
    while True:
        doubled = pointer[pointer]
        if np.array_equal(doubled, pointer):
            return np.asarray(target.reshape(-1)[pointer])
        pointer = doubled


def motion_blur(image: UInt8Image, severity: int, rng: np.random.Generator) -> UInt8Image:
    """Blur along a line within 45 degrees of horizontal. One draw: the angle."""
    angle = -45.0 + 90.0 * rng.random()
    radius, deviation = _MOTION[severity - 1]
    # In levels, as in the references: on a flat area the scale decides on which side of a whole level the sum falls.
    return truncate_levels(motion(image.astype(np.float64), radius, deviation, angle))


def zoom_blur(image: UInt8Image, severity: int, _rng: np.random.Generator) -> UInt8Image:
    """Average the image with its magnifications by several factors, 1 among them. No draws."""
    x = unit(image)
    factors = _ZOOM_FACTORS[severity - 1].tolist()
    return truncate_unit((x + zoom_sum(x, factors)) / (len(factors) + 1))


def gaussian_blur(image: UInt8Image, severity: int, _rng: np.random.Generator) -> UInt8Image:
    """Gaussian filter with replicated edges. No draws."""
    return truncate_unit(gaussian(unit(image), _GAUSSIAN_DEVIATION[severity - 1]))
