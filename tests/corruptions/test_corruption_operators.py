"""Operators against scipy, OpenCV, the standard library, and the definitions written as plain loops."""

from __future__ import annotations

import colorsys
import math

import cv2
import numpy as np
import pytest
import scipy.ndimage
from numpy.typing import NDArray

from symphony_vlm.corruptions import blur, digital
from symphony_vlm.corruptions.colour import hsv_to_rgb, rgb_to_hsv
from symphony_vlm.corruptions.operators import (
    gaussian_mirrored,
    motion,
    plasma,
    power_of_two_at_least,
    truncate_levels,
    truncate_unit,
    unit,
    zoom,
    zoom_sum,
)

RNG = np.random.default_rng


def test_truncation_drops_the_fraction_and_clips() -> None:
    assert truncate_levels(np.array([-1.0, 0.99, 1.0, 254.999, 256.0])).tolist() == [0, 0, 1, 254, 255]
    assert truncate_unit(np.array([-0.1, 0.5, 1.2])).tolist() == [0, 127, 255]


def test_every_level_survives_scaling_and_truncation() -> None:
    levels = np.arange(256, dtype=np.uint8)
    assert (truncate_unit(unit(levels)) == levels).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (17, 31), (64, 64)])
@pytest.mark.parametrize("deviations", [(170.8, 170.8), (19.52, 19.52), (2.44, 2.44), (0.17, 0.31)])
def test_mirrored_gaussian_equals_scipy(shape: tuple[int, int], deviations: tuple[float, float]) -> None:
    a = RNG(0).uniform(-1, 1, shape)
    expected = scipy.ndimage.gaussian_filter(a, deviations, mode="reflect", truncate=3.0)
    np.testing.assert_allclose(gaussian_mirrored(a, deviations), expected, atol=1e-12)  # worst case seen: 2e-15


def zoom_by_scipy(a: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    height, width = a.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    crop = a[top : top + rows, left : left + columns]
    enlarged = scipy.ndimage.zoom(crop, (factor, factor, 1), order=1)
    top, left = (enlarged.shape[0] - height) // 2, (enlarged.shape[1] - width) // 2
    return np.asarray(enlarged[top : top + height, left : left + width])


@pytest.mark.parametrize("shape", [(1, 40, 3), (17, 31, 3), (64, 50, 3)])
@pytest.mark.parametrize("factor", [1.0, 1.01, 1.11, 1.24, 2.0, 2.5, 4.0, 4.5])
def test_zoom_equals_scipy(shape: tuple[int, int, int], factor: float) -> None:
    a = RNG(1).random(shape)
    np.testing.assert_allclose(zoom(a, factor), zoom_by_scipy(a, factor), atol=1e-12)


def test_zoom_sum_adds_up() -> None:
    a = RNG(2).random((30, 41, 3))
    np.testing.assert_allclose(zoom_sum(a, [1.1, 1.2, 3.0]), zoom(a, 1.1) + zoom(a, 1.2) + zoom(a, 3.0), atol=1e-14)


def test_zoom_factors_are_the_published_ones() -> None:
    last = [(len(factors), round(float(factors[-1]), 6)) for factors in blur._ZOOM_FACTORS]
    assert last == [(12, 1.11), (16, 1.15), (11, 1.20), (13, 1.24), (11, 1.30)]


@pytest.mark.parametrize("angle", [-135.0, -100.3, -90.0, -45.0, -13.7, 0.0, 22.2, 45.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7, 3), (30, 20)])
def test_motion_equals_its_definition(shape: tuple[int, ...], angle: float) -> None:
    radius, deviation = 10, 4.0
    a = RNG(3).random(shape)
    height, width = shape[:2]
    weights = [math.exp(-(i**2) / (2 * deviation**2)) for i in range(2 * radius + 1)]
    expected = np.zeros(shape)
    for y in range(height):
        for x in range(width):
            for i, weight in enumerate(weights):
                row = y + math.ceil(i * math.sin(math.radians(angle)) - 0.5)
                column = x + math.ceil(i * math.cos(math.radians(angle)) - 0.5)
                expected[y, x] += weight * a[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
    np.testing.assert_allclose(motion(a, radius, deviation, angle), expected / sum(weights), atol=1e-12)


def plasma_by_loops(rng: np.random.Generator, n: int, decay: float) -> NDArray[np.float64]:
    m = np.zeros((n, n))
    t, w = n, 100.0
    while t >= 2:
        h = t // 2

        def at(i: int, j: int) -> float:
            return float(m[i % n, j % n])

        draws = iter((w * (-w + 2 * w * rng.random((n // t) ** 2))).tolist())
        for i in range(0, n, t):
            for j in range(0, n, t):
                m[i + h, j + h] = (at(i, j) + at(i + t, j) + at(i, j + t) + at(i + t, j + t)) / 4 + next(draws)
        draws = iter((w * (-w + 2 * w * rng.random((n // t) ** 2))).tolist())
        for i in range(0, n, t):
            for j in range(0, n, t):
                m[i, j + h] = (at(i + h, j + h) + at(i - h, j + h) + at(i, j) + at(i, j + t)) / 4 + next(draws)
        draws = iter((w * (-w + 2 * w * rng.random((n // t) ** 2))).tolist())
        for i in range(0, n, t):
            for j in range(0, n, t):
                m[i + h, j] = (at(i + h, j + h) + at(i + h, j - h) + at(i, j) + at(i + t, j)) / 4 + next(draws)
        t, w = h, w / decay
    return (m - m.min()) / (m.max() - m.min())


@pytest.mark.parametrize("size", [2, 4, 32])
def test_plasma_equals_its_definition(size: int) -> None:
    field = plasma(RNG(4), size, 1.7)
    assert field.dtype == np.float32 and field.min() == 0 and field.max() == 1
    np.testing.assert_allclose(field, plasma_by_loops(RNG(4), size, 1.7), atol=1e-6)


def test_power_of_two() -> None:
    assert [power_of_two_at_least(n) for n in (1, 2, 3, 224, 256, 257)] == [2, 2, 4, 256, 256, 512]


def test_hsv_equals_the_standard_library_and_inverts() -> None:
    x = RNG(5).integers(0, 256, (20, 20, 3)) / 255
    x[0, :4] = [(0, 0, 0), (1, 1, 1), (0.5, 0.5, 0.5), (1, 0, 0)]
    hue, saturation, value = rgb_to_hsv(x)
    for i in range(20):
        for j in range(20):
            expected = colorsys.rgb_to_hsv(*x[i, j])
            assert (hue[i, j], saturation[i, j], value[i, j]) == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(hsv_to_rgb(hue, saturation, value), x, atol=1e-12)


def test_defocus_kernel_sums_and_areas() -> None:
    sums = [float(blur.defocus_kernel(severity).sum()) for severity in range(1, 6)]
    assert sums == pytest.approx([1, 1, 1, 1.01298, 1.01079], abs=1e-5)
    assert [blur.defocus_kernel(severity).shape for severity in (1, 4, 5)] == [(17, 17), (17, 17), (21, 21)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 5), (40, 30)])
def test_defocus_mirrors_images_smaller_than_the_kernel(shape: tuple[int, int]) -> None:
    image = RNG(6).integers(0, 256, (*shape, 3)).astype(np.uint8)
    kernel = blur.defocus_kernel(5).astype(np.float64)
    expected = np.stack(
        [scipy.ndimage.correlate(image[..., c] / 255.0, kernel, mode="mirror") for c in range(3)], axis=-1
    )
    out = blur.defocus_blur(image, 5, RNG(0))
    assert np.abs(out.astype(int) - np.clip(expected, 0, 1) * 255).max() < 1 + 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (24, 31)])
def test_displacement_equals_scipy_map_coordinates(shape: tuple[int, int]) -> None:
    x = RNG(7).random((*shape, 3)).astype(np.float32)
    dx, dy = (20 * RNG(8).standard_normal((2, *shape))).astype(np.float32)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    expected = np.stack(
        [
            scipy.ndimage.map_coordinates(x[..., c], (rows + dy, columns + dx), order=1, mode="reflect")
            for c in range(3)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(digital._displace(x, dx, dy), expected, atol=1e-6)


def test_affine_map_equals_opencv() -> None:
    """OpenCV before 5 rounds positions to 1/32 pixel, hence the tolerance; version 5 agrees to 5e-5."""
    y, x = np.mgrid[:60, :90]
    image = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=-1).astype(np.float32) * 0.5 + 0.5
    moved = digital._random_affine(image, 4.88, RNG(9))
    before = np.array([[65, 50], [65, 10], [25, 10]], np.float32)
    after = before + (-4.88 + 2 * 4.88 * RNG(9).random((3, 2))).astype(np.float32)
    matrix = cv2.getAffineTransform(before, after)
    expected = cv2.warpAffine(image, matrix, (90, 60), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    np.testing.assert_allclose(moved, expected, atol=1 / 32 * 0.2)
