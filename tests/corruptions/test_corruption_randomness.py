"""Keys, generators and the canary."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from symphony_vlm.corruptions import canary, corrupt, corruption_rng, image_key
from symphony_vlm.errors import InputError


def test_published_vector() -> None:
    key = image_key(b"")
    assert key == hashlib.sha256(b"").hexdigest()
    rng = corruption_rng(key, "gaussian_noise", 3, 0)
    assert [float(rng.random()) for _ in range(3)] == [0.8167480098902262, 0.9687826412308017, 0.9932536087905185]


def test_material_of_the_vector() -> None:
    material = f"symphony-vlm/corruption/1\n{image_key(b'')}\ngaussian_noise\n3\n0".encode()
    digest = hashlib.sha256(material)
    assert digest.hexdigest() == "fbfd7e1b523b99b411c745bdb6d443de295f5b2ab7cbeefd36ae117aac71a1e0"
    words = np.frombuffer(digest.digest(), "<u4").tolist()
    expected = np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
    assert (corruption_rng(image_key(b""), "gaussian_noise", 3, 0).random(5) == expected.random(5)).all()


def test_array_key_names_shape_and_pixels() -> None:
    pixels = np.arange(36, dtype=np.uint8).reshape(2, 6, 3)
    header = b"RGB8" + (2).to_bytes(4, "little") + (6).to_bytes(4, "little")
    assert image_key(pixels) == hashlib.sha256(header + pixels.tobytes()).hexdigest()
    assert image_key(pixels) != image_key(pixels.reshape(3, 4, 3))
    assert image_key(pixels[:, ::-1]) == image_key(pixels[:, ::-1].copy())


def test_array_key_refuses_other_arrays() -> None:
    with pytest.raises(InputError, match="int64"):
        image_key(np.zeros((2, 2, 3), np.int64))  # type: ignore[arg-type]


def test_every_part_of_the_key_matters() -> None:
    parts = [("a", "fog", 1, 0), ("b", "fog", 1, 0), ("a", "snow", 1, 0), ("a", "fog", 2, 0), ("a", "fog", 1, 1)]
    assert len({float(corruption_rng(*part).random()) for part in parts}) == len(parts)


def test_canary_is_a_stable_digest() -> None:
    assert canary() == canary()
    assert re.fullmatch("[0-9a-f]{64}", canary())


def test_golden_pixels() -> None:
    """impulse_noise needs only uniform draws, which numpy keeps stable: equal pixels on every installation."""
    image = np.arange(3072, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)
    out = corrupt(image, "impulse_noise", 3, corruption_rng(image_key(image), "impulse_noise", 3, 0))
    assert (
        hashlib.sha256(out.tobytes()).hexdigest() == "ae769f2167952adf7b47241a12a05a336870253a39c403e204a72932964cc2e5"
    )
