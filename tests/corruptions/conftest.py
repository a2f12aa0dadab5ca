"""Images and frost textures shared by the tests of corruptions."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from symphony_vlm.corruptions.frost_textures import FROST_DIR_VARIABLE

_PATTERN_SHA256 = "332061f263467c24c254ff9f68340871e171774801eb174fb0feda3cb638cf09"


@pytest.fixture(scope="session")
def pattern() -> NDArray[np.uint8]:
    """The 224 x 336 test image of the reference values, read-only: waves in red and green, squares in blue."""
    y, x = np.mgrid[:224, :336]
    red = np.round(127.5 + 127.5 * np.sin(2 * np.pi * (x + 0.5) / 56))
    green = np.round(127.5 + 127.5 * np.sin(2 * np.pi * (y + 0.5) / 40))
    blue = np.where((x // 28 + y // 28) % 2 == 1, 255, 32)
    image = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    assert hashlib.sha256(image.tobytes()).hexdigest() == _PATTERN_SHA256
    image.setflags(write=False)
    return image


@pytest.fixture(scope="session")
def frost_folder() -> Path | None:
    """Where the published textures are, if they are."""
    if named := os.environ.get(FROST_DIR_VARIABLE):
        return Path(named)
    shared = os.environ.get("SYMPHONY_VLM_SHARED_DATA")
    data = Path(shared) if shared else Path(__file__).resolve().parents[4] / "shared" / "data"
    folder = data / "corruption" / "frost"
    return folder if folder.is_dir() else None


@pytest.fixture(autouse=True)
def _frost_textures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, frost_folder: Path | None) -> None:
    """Point the package at the textures; a test whose ``name`` is frost is skipped without them."""
    if frost_folder is not None:
        monkeypatch.setenv(FROST_DIR_VARIABLE, str(frost_folder))
        return
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("name") == "frost":
        pytest.skip(f"frost textures absent: set {FROST_DIR_VARIABLE} or SYMPHONY_VLM_SHARED_DATA")
