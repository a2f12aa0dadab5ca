"""All 19 corruptions at all severities on real photos at the sizes that vision encoders see; needs the shared data."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from symphony_vlm.corruptions import ALL, at_long_side, corrupt, corruption_rng, image_key
from symphony_vlm.data.images import load_image
from symphony_vlm.data.sample import ImageRef

SHARED = "SYMPHONY_VLM_SHARED_DATA"
SEVERITIES = (1, 2, 3, 4, 5)
GROWS = {
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "defocus_blur",
    "motion_blur",
    "zoom_blur",
    "gaussian_blur",
    "brightness",
    "contrast",
    "jpeg_compression",
    "spatter",
}
"""Those of which the definition implies a change that grows with severity, on the mean over photos: motion_blur draws
an angle and spatter its drops anew at each severity, so that a single photo can have less of it."""


@pytest.fixture(scope="module")
def files(frost_folder: Path | None) -> list[Path]:
    """Eight photos of COCO, evenly over its files."""
    shared = os.environ.get(SHARED)
    if not shared:
        pytest.skip(f"{SHARED} is not set")
    if frost_folder is None:
        pytest.skip("frost textures absent")
    found = sorted((Path(shared) / "instruct" / "images" / "coco").glob("*.jpg"))
    return found[:: len(found) // 8][:8]


def _photo(path: Path, size: int) -> NDArray[np.uint8]:
    return at_long_side(np.asarray(load_image(ImageRef(path=path))), size)


AVERAGES = {"glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "contrast", "pixelate", "elastic_transform"}


def _check_range(photo: NDArray[np.uint8], out: NDArray[np.uint8], name: str, severity: int) -> None:
    """What the definitions say of the values; truncation may take one level, two filters in a row two."""
    levels = out.astype(int)
    # The disc's weights sum to more than one at severities 4 and 5.
    if name in AVERAGES or (name == "defocus_blur" and severity <= 3):
        lowest, highest = photo.min(axis=(0, 1)).astype(int), photo.max(axis=(0, 1))
        assert (levels >= lowest - 2).all() and (levels <= highest).all()
    elif name == "impulse_noise":
        assert ((out == photo) | (out == 0) | (out == 255)).all()
    elif name == "brightness":
        assert (levels >= photo.astype(int) - 1).all()


@pytest.mark.parametrize(
    ("size", "count"),
    [(32, 8), (224, 4), (336, 4), pytest.param(1024, 4, marks=pytest.mark.slow)],
)
def test_all_corruptions_of_photos(size: int, count: int, files: list[Path]) -> None:
    """Shapes, types and ranges, something changes, and the mean distortion grows where it must."""
    changes = np.zeros((count, len(ALL), len(SEVERITIES)))
    for number, path in enumerate(files[:count]):
        photo, key = _photo(path, size), image_key(path.read_bytes())
        assert max(photo.shape[:2]) == size
        for place, name in enumerate(ALL):
            for severity in SEVERITIES:
                out = corrupt(photo, name, severity, corruption_rng(key, name, severity, 0))
                assert out.dtype == np.uint8 and out.shape == photo.shape
                _check_range(photo, out, name, severity)
                changes[number, place, severity - 1] = np.abs(out.astype(np.int16) - photo).mean()
    # By less than a level in a hundred values nothing has changed.
    assert (changes > 0.01).all()
    for name, row in zip(ALL, changes.mean(axis=0).tolist(), strict=True):
        if name in GROWS:
            assert all(a < b for a, b in itertools.pairwise(row)), (name, row)


_SCRIPT = """
import hashlib, sys
from pathlib import Path
import numpy as np
from symphony_vlm.corruptions import at_long_side, corrupt, corruption_rng, image_key
from symphony_vlm.data.images import load_image
from symphony_vlm.data.sample import ImageRef
path = Path(sys.argv[1])
photo, key = at_long_side(np.asarray(load_image(ImageRef(path=path))), 224), image_key(path.read_bytes())
for name in sys.argv[2:]:
    for severity in (5, 4, 3, 2, 1):
        pixels = corrupt(photo, name, severity, corruption_rng(key, name, severity, 0))
        print(name, severity, hashlib.sha256(pixels.tobytes()).hexdigest())
"""


def test_one_and_two_processes_make_the_same_pixels(files: list[Path]) -> None:
    """Every corruption in either process, in the opposite order of severities, beside each other."""
    photo, key = _photo(files[0], 224), image_key(files[0].read_bytes())
    here = set()
    for name in ALL:
        for severity in SEVERITIES:
            pixels = corrupt(photo, name, severity, corruption_rng(key, name, severity, 0))
            here.add(f"{name} {severity} {hashlib.sha256(pixels.tobytes()).hexdigest()}")
    shares = (ALL[::2], ALL[1::2])
    processes = [
        subprocess.Popen([sys.executable, "-c", _SCRIPT, str(files[0]), *share], stdout=subprocess.PIPE, text=True)
        for share in shares
    ]
    there = [line for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(there) == len(here) == 95 and set(there) == here
