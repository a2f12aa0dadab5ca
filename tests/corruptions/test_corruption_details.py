"""Single corruptions: shares and deviations of noise, the displacement of glass_blur, snow, frost, spatter."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from symphony_vlm.corruptions import corrupt
from symphony_vlm.corruptions.blur import displacement_sources

RNG = np.random.default_rng
GREY = np.full((256, 256, 3), 128, np.uint8)


@pytest.mark.parametrize(("severity", "share"), [(1, 0.03), (2, 0.06), (3, 0.09), (4, 0.17), (5, 0.27)])
def test_impulse_shares(severity: int, share: float) -> None:
    out = corrupt(GREY, "impulse_noise", severity, RNG(0))
    half = share / 2
    error = math.sqrt(half * (1 - half) / out.size)
    assert (out == 255).mean() == pytest.approx(half, abs=4 * error)
    assert (out == 0).mean() == pytest.approx(half, abs=4 * error)
    assert set(np.unique(out)) == {0, 128, 255}


@pytest.mark.parametrize(
    ("name", "severity", "deviation"),
    [
        ("gaussian_noise", 1, 0.08 * 255),
        ("gaussian_noise", 2, 0.12 * 255),
        ("shot_noise", 1, math.sqrt(128 / 255 / 60) * 255),
        ("speckle_noise", 1, 0.15 * 128),
        ("speckle_noise", 2, 0.20 * 128),
    ],
)
def test_noise_deviation_on_grey(name: str, severity: int, deviation: float) -> None:
    """Where nothing is clipped; truncation adds 1/12 to the variance and takes half a level from the mean."""
    out = corrupt(GREY, name, severity, RNG(1)).astype(np.float64)
    expected = math.sqrt(deviation**2 + 1 / 12)
    assert out.std() == pytest.approx(expected, abs=4 * expected / math.sqrt(2 * out.size))
    # The counts of shot_noise fall on a few levels only, so its loss to truncation is not half a level exactly.
    assert out.mean() == pytest.approx(127.5, abs=4 * expected / math.sqrt(out.size) + 0.25 * (name == "shot_noise"))


def test_noise_is_independent_per_channel() -> None:
    for name in ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"):
        out = corrupt(GREY, name, 3, RNG(2)).reshape(-1, 3).astype(np.float64)
        correlation = np.asarray(np.corrcoef(out.T))[np.triu_indices(3, 1)]
        assert np.abs(correlation).max() < 4 / math.sqrt(len(out))


def displace_by_loop(
    image: NDArray[np.int64], reach: int, dx: NDArray[np.int64], dy: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The reference loop: what it writes as a swap of array views is a copy."""
    y = image[..., None].copy()
    height, width = image.shape
    for i, h in enumerate(range(height - reach, reach, -1)):
        for j, w in enumerate(range(width - reach, reach, -1)):
            h_source, w_source = h + dy[i, j], w + dx[i, j]
            y[h, w], y[h_source, w_source] = y[h_source, w_source], y[h, w]
    return y[..., 0]


@pytest.mark.parametrize("reach", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(9, 9), (9, 12), (12, 17), (40, 33)])
def test_glass_pointers_equal_the_loop(size: tuple[int, int], reach: int) -> None:
    height, width = size
    region = (height - 2 * reach, width - 2 * reach)
    image = np.arange(height * width).reshape(size)
    for seed in range(20):
        rng = RNG(seed)
        dx, dy = rng.integers(-reach, reach, region), rng.integers(-reach, reach, region)
        sources = displacement_sources(height, width, dx, dy).reshape(size)
        assert (sources == displace_by_loop(image, reach, dx, dy)).all()


def test_glass_loses_pixels_because_the_swap_is_a_copy() -> None:
    dx, dy = RNG(3).integers(-2, 2, (2, 96, 96))
    kept = len(np.unique(displacement_sources(100, 100, dx, dy))) / 100**2
    assert 0.4 < kept < 0.7


def test_glass_leaves_the_pixels_of_a_narrow_image_in_place() -> None:
    image = RNG(4).integers(0, 256, (8, 30, 3)).astype(np.uint8)
    assert (corrupt(image, "glass_blur", 5, RNG(0)) == corrupt(image, "glass_blur", 5, RNG(1))).all()
    assert (corrupt(image, "glass_blur", 4, RNG(0)) != corrupt(image, "glass_blur", 4, RNG(1))).any()


def test_snow_falls_the_same_from_both_ends() -> None:
    """On black the background is flat, and the layer plus its half turn is symmetric."""
    out = corrupt(np.zeros((40, 60, 3), np.uint8), "snow", 2, RNG(5))
    assert (out == out[::-1, ::-1]).all() and out.std() > 0


def test_fog_keeps_black_black_and_never_exceeds_the_maximum() -> None:
    assert corrupt(np.zeros((9, 9, 3), np.uint8), "fog", 5, RNG(6)).max() == 0
    assert corrupt(np.full((9, 9, 3), 90, np.uint8), "fog", 5, RNG(6)).max() <= 90


@pytest.mark.parametrize("name", ["frost"])
def test_frost_uses_its_first_five_textures(name: str) -> None:
    """Black shows the texture alone; 2 and 3 are the same pixels, so four kinds of frost are seen."""
    black = np.zeros((600, 900, 3), np.uint8)
    means: dict[int, list[float]] = {}
    for seed in range(40):
        index = int(RNG(seed).integers(0, 5))
        means.setdefault(index, []).append(float(corrupt(black, name, 3, RNG(seed)).mean()))
    assert sorted(means) == [0, 1, 2, 3, 4]
    typical = [float(np.median(means[index])) for index in range(5)]
    assert typical[1] == pytest.approx(typical[2], rel=0.1)
    assert len({round(value) for value in typical}) >= 4


def test_procedural_frost_is_bluish() -> None:
    out = corrupt(np.zeros((50, 60, 3), np.uint8), "frost_procedural", 3, RNG(7))
    red, green, blue = out.reshape(-1, 3).mean(axis=0)
    assert red < green < blue <= 255 * 0.7


def test_spatter_without_a_drop_changes_nothing() -> None:
    pixel = np.full((1, 1, 3), 100, np.uint8)
    results = {tuple(corrupt(pixel, "spatter", 1, RNG(seed)).ravel().tolist()) for seed in range(30)}
    assert (100, 100, 100) in results


def test_saturation_of_grey_and_black() -> None:
    """Grey has hue 0, so an added saturation makes it red; black stays black."""
    grey = corrupt(np.full((2, 2, 3), 100, np.uint8), "saturate", 5, RNG(0))
    assert grey[0, 0].tolist() == [100, 80, 80]
    assert corrupt(np.zeros((2, 2, 3), np.uint8), "saturate", 5, RNG(0)).max() == 0


def test_contrast_of_two_values() -> None:
    image = np.zeros((1, 2, 3), np.uint8)
    image[0, 1] = 200
    assert corrupt(image, "contrast", 1, RNG(0))[0, :, 0].tolist() == [60, 140]
