"""The keyed generator: the same image, corruption, severity and seed give the same draws, whatever ran before.

No global random state is read or written, so results do not depend on order, batch, worker or rank.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.errors import InputError

__all__ = ["canary", "corruption_rng", "image_key", "require_rgb8"]

_SCHEME = "symphony-vlm/corruption/1"


def require_rgb8(image: object) -> NDArray[np.uint8]:
    """Return ``image`` if it is a uint8 array ``[H, W, 3]`` with H, W >= 1.

    Raises:
        InputError: It is anything else.
    """
    remedy = "Convert it first: numpy.asarray(pillow_image.convert('RGB'))"
    if not isinstance(image, np.ndarray):
        raise InputError(f"image is a {type(image).__name__}, expected a uint8 array [H, W, 3]", remedy=remedy)
    if image.dtype != np.uint8:
        raise InputError(f"image has dtype {image.dtype}, expected uint8", remedy=remedy)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(f"image has shape {image.shape}, expected [H, W, 3] with H, W >= 1", remedy=remedy)
    return image


def image_key(data: bytes | NDArray[np.uint8]) -> str:
    """Identify an image by content.

    Args:
        data: The encoded bytes of its file, or uint8 ``[H, W, 3]`` if there is no file. The two kinds of key of one
            picture differ.

    Returns:
        sha256 in hexadecimal, 64 digits.

    Raises:
        InputError: An array that is not uint8 ``[H, W, 3]``.
    """
    if isinstance(data, (bytes, bytearray, memoryview)):
        return hashlib.sha256(data).hexdigest()
    image = require_rgb8(data)
    header = b"RGB8" + struct.pack("<II", image.shape[0], image.shape[1])
    return hashlib.sha256(header + image.tobytes()).hexdigest()


def corruption_rng(key: str, name: str, severity: int | str, seed: int) -> np.random.Generator:
    """The generator of one (image, corruption, severity, seed).

    Args:
        key: From `image_key`.
        name: Name of the corruption; perturbations outside this package use names of their own.
        severity: 0 to 5; a perturbation with a continuous strength gives it as decimal text.
        seed: Any integer; the seed of the run.
    """
    material = "\n".join((_SCHEME, key, name, str(severity), str(seed))).encode("ascii")
    words = struct.unpack("<8I", hashlib.sha256(material).digest())
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def canary() -> str:
    """Digest of 64 draws of each distribution in use, for the manifest of a run.

    numpy promises the bit stream of a generator, not how later versions turn it into normal or Poisson draws. Two
    installations with one canary draw the same numbers.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(0)))
    draws: tuple[NDArray[Any], ...] = (
        rng.random(64),
        rng.standard_normal(64),
        # Means on both sides of 10, where numpy changes the algorithm.
        rng.poisson(np.linspace(0.0, 63.0, 64)),
        rng.integers(-4, 4, 64),
    )
    digest = hashlib.sha256()
    for array in draws:
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
