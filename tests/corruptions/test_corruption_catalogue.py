"""The table, the choice of corruptions on the command line, and the search for frost textures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from symphony_vlm.corruptions import (
    ALL,
    COMMON,
    CORRUPTIONS,
    EXTRA,
    corrupt,
    find_frost_textures,
    parse_corruptions,
)
from symphony_vlm.corruptions.frost_textures import FROST_DIR_VARIABLE, covering_texture
from symphony_vlm.errors import InputError


def test_groups() -> None:
    assert len(COMMON) == 15 and COMMON[0] == "gaussian_noise" and COMMON[-1] == "jpeg_compression"
    assert EXTRA == ("speckle_noise", "gaussian_blur", "spatter", "saturate")
    assert ALL == COMMON + EXTRA


def test_families_of_the_fifteen() -> None:
    families = [CORRUPTIONS[name].family for name in COMMON]
    assert families == ["noise"] * 3 + ["blur"] * 4 + ["weather"] * 4 + ["digital"] * 4


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("all", list(ALL)),
        (" common ", list(COMMON)),
        ("none", []),
        ("fog,snow", ["fog", "snow"]),
        ("snow, fog , snow", ["snow", "fog"]),
        ("frost_procedural,elastic_ic", ["frost_procedural", "elastic_ic"]),
    ],
)
def test_parse(text: str, names: list[str]) -> None:
    assert parse_corruptions(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fogg", "unknown corruption 'fogg'; did you mean 'fog'"),
        ("fog,comon", "did you mean 'common'"),
        ("", "unknown corruption ''"),
        ("fog,,snow", "unknown corruption ''"),
        ("qqqq", "Valid: all, common, none, gaussian_noise"),
        ("fog,all", "stands alone"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_corruptions(text)


def test_frost_without_textures_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    monkeypatch.setenv(FROST_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(InputError, match=r"frost1\.png is missing.*SYMPHONY_VLM_FROST_DIR.*frost_procedural"):
        corrupt(image, "frost", 1, np.random.default_rng(0))
    assert corrupt(image, "frost_procedural", 1, np.random.default_rng(0)).any()


def test_neither_folder_nor_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FROST_DIR_VARIABLE, raising=False)
    monkeypatch.setattr("importlib.metadata.files", lambda name: None)
    with pytest.raises(InputError, match="SYMPHONY_VLM_FROST_DIR is not set"):
        find_frost_textures()


def test_other_pixels_are_not_frost(tmp_path: Path) -> None:
    (tmp_path / "frost1.png").write_bytes(b"something else")
    with pytest.raises(InputError, match=r"frost1\.png is not the published texture.*ff9f907860bd7a83"):
        find_frost_textures(tmp_path)


def test_textures_of_an_installed_distribution(monkeypatch: pytest.MonkeyPatch, frost_folder: Path | None) -> None:
    if frost_folder is None:
        pytest.skip("frost textures absent")

    class Installed:
        def __init__(self, path: Path) -> None:
            self.name, self.path = path.name, path

        def locate(self) -> Path:
            return self.path

    monkeypatch.delenv(FROST_DIR_VARIABLE, raising=False)
    monkeypatch.setattr("importlib.metadata.files", lambda name: [Installed(p) for p in frost_folder.iterdir()])
    assert [path.name for path in find_frost_textures()] == [
        "frost1.png",
        "frost2.png",
        "frost3.png",
        "frost4.jpg",
        "frost5.jpg",
        "frost6.jpg",
    ]


@pytest.mark.parametrize(("height", "width"), [(10, 10), (315, 560), (316, 100), (1200, 80)])
@pytest.mark.parametrize("name", ["frost"])
def test_texture_covers_the_image(name: str, height: int, width: int) -> None:
    for index in range(6):
        texture = covering_texture(index, height, width)
        assert texture.shape[0] > height and texture.shape[1] > width
        assert not texture.flags.writeable
