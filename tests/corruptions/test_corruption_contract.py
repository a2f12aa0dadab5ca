"""What holds for every corruption: shape, type, purity, determinism, any size, constant images, refusals."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from symphony_vlm.corruptions import ALL, CORRUPTIONS, corrupt, corruption_rng, image_key
from symphony_vlm.errors import InputError

DETERMINISTIC = {
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
}
NAMES = list(CORRUPTIONS)
SMALL_SIZES = [(1, 1), (1, 2), (2, 1), (3, 3), (1, 400), (400, 1), (17, 31)]
KEY = image_key(b"contract")


def noise_image(height: int, width: int) -> NDArray[np.uint8]:
    image = np.random.default_rng(7).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image.setflags(write=False)
    return image


def apply(image: NDArray[np.uint8], name: str, severity: int, seed: int = 0, key: str = KEY) -> NDArray[np.uint8]:
    return corrupt(image, name, severity, corruption_rng(key, name, severity, seed))


def check_size(height: int, width: int, name: str, severity: int) -> None:
    image = noise_image(height, width)
    with np.errstate(all="raise", under="ignore"):
        out = apply(image, name, severity)
    assert out.dtype == np.uint8 and out.shape == image.shape


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SMALL_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_small_sizes(size: tuple[int, int], name: str) -> None:
    for severity in range(1, 6):
        check_size(*size, name, severity)


@pytest.mark.parametrize("name", NAMES)
def test_vga(name: str) -> None:
    check_size(480, 640, name, 3)


@pytest.mark.parametrize("name", ["impulse_noise", "contrast", "pixelate", "jpeg_compression"])
def test_large(name: str) -> None:
    check_size(2000, 3000, name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_large_all(name: str, severity: int) -> None:
    check_size(2000, 3000, name, severity)


@pytest.mark.parametrize("name", NAMES)
def test_tiny_images_with_many_seeds(name: str) -> None:
    """Displacements far larger than the image, degenerate affine maps, drops that cover everything or nothing."""
    for seed in range(20):
        for severity in (1, 2, 5):
            out = apply(noise_image(2, 3), name, severity, seed)
            assert out.shape == (2, 3, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (12, 200, 90)], ids=str)
def test_constant_images(colour: tuple[int, int, int], name: str) -> None:
    image = np.full((40, 52, 3), colour, np.uint8)
    for severity in range(1, 6):
        with np.errstate(all="raise", under="ignore"):
            out = apply(image, name, severity)
        assert out.shape == image.shape
        if name in {"zoom_blur", "glass_blur", "motion_blur", "gaussian_blur", "contrast", "pixelate", "elastic_ic"}:
            # Filters keep a constant up to one level, lost to truncation.
            assert np.abs(out.astype(int) - image).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_input_is_not_modified_and_output_is_new(name: str, pattern: NDArray[np.uint8]) -> None:
    image = pattern[:60, :90].copy()
    before = image.tobytes()
    for severity in (0, 3):
        out = apply(image, name, severity)
        out[...] = 77
        assert image.tobytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_severity_zero_is_the_identity(name: str, pattern: NDArray[np.uint8]) -> None:
    assert apply(pattern, name, 0).tobytes() == pattern.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_views_of_any_memory_layout(name: str, pattern: NDArray[np.uint8]) -> None:
    view = pattern[10:70:2, 100:20:-1, ::-1]
    assert not view.flags.c_contiguous
    assert apply(view, name, 3).tobytes() == apply(np.ascontiguousarray(view), name, 3).tobytes()


def test_equal_bytes_in_any_order(pattern: NDArray[np.uint8], frost_folder: object) -> None:
    image = pattern[:64, :80]
    cells = [(name, severity) for name in NAMES for severity in (2, 4) if name != "frost" or frost_folder]
    np.random.seed(0)
    forward = {cell: apply(image, *cell).tobytes() for cell in cells}
    np.random.seed(1)
    backward = {cell: apply(image, *cell).tobytes() for cell in reversed(cells)}
    assert forward == backward


def test_global_random_state_is_neither_read_nor_written(pattern: NDArray[np.uint8], frost_folder: object) -> None:
    np.random.seed(3)
    before = np.random.get_state(legacy=False)
    for name in NAMES:
        if name != "frost" or frost_folder:
            apply(pattern[:48, :48], name, 3)
    after = np.random.get_state(legacy=False)
    assert str(before) == str(after)


_DIGEST_SCRIPT = """
import hashlib, sys
import cv2, numpy as np
from symphony_vlm.corruptions import corrupt, corruption_rng, image_key
cv2.setNumThreads(int(sys.argv[1]))
image = np.random.default_rng(7).integers(0, 256, (96, 128, 3)).astype(np.uint8)
digest = hashlib.sha256()
for name in sys.argv[2:]:
    digest.update(corrupt(image, name, 3, corruption_rng(image_key(b"contract"), name, 3, 0)).tobytes())
print(digest.hexdigest())
"""


def test_equal_bytes_in_another_process_with_other_thread_counts(frost_folder: object) -> None:
    names = [name for name in NAMES if name != "frost" or frost_folder]
    image = noise_image(96, 128)
    here = hashlib.sha256(b"".join(apply(image, name, 3).tobytes() for name in names)).hexdigest()
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", _DIGEST_SCRIPT, threads, *names]
        there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        assert there == here


@pytest.mark.parametrize("name", NAMES)
def test_seed_severity_and_image_change_the_pixels(name: str, pattern: NDArray[np.uint8]) -> None:
    image = pattern[:96, :128]
    first = apply(image, name, 3)
    assert (apply(image, name, 4) != first).any()
    same_draws = apply(image, name, 3, seed=1).tobytes() == first.tobytes()
    assert same_draws == (name in DETERMINISTIC)
    if name not in DETERMINISTIC:
        assert (apply(image, name, 3, key=image_key(b"another file")) != first).any()


@pytest.mark.parametrize("severity", [-1, 6, 2.0, True, "3", None])
def test_severity_is_checked(severity: object, pattern: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match="0, 1, 2, 3, 4, 5"):
        corrupt(pattern, "fog", severity, np.random.default_rng(0))  # type: ignore[arg-type]


def test_numpy_integers_are_severities(pattern: NDArray[np.uint8]) -> None:
    rng = np.random.default_rng(0)
    assert (corrupt(pattern, "contrast", np.int64(2), rng) == corrupt(pattern, "contrast", 2, rng)).all()  # type: ignore[arg-type]


def test_unknown_name_is_refused_with_the_nearest(pattern: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match=r"'gausian_noise'; did you mean 'gaussian_noise'\?.*Valid: gaussian_noise, "):
        corrupt(pattern, "gausian_noise", 1, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "dtype float32"),
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        ([[1, 2, 3]], "is a list"),
    ],
)
def test_other_images_are_refused(image: object, message: str) -> None:
    for severity in (0, 1):
        with pytest.raises(InputError, match=message):
            corrupt(image, "fog", severity, np.random.default_rng(0))  # type: ignore[arg-type]


def test_all_covers_the_nineteen_without_variants() -> None:
    assert len(ALL) == 19 and set(CORRUPTIONS) - set(ALL) == {"frost_procedural", "elastic_ic"}
