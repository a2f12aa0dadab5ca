"""The sheet of all corruptions: every picture stands where its name and severity say, pixel for pixel."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from symphony_vlm.cli import main
from symphony_vlm.corruptions import ALL, COMMON, CORRUPTIONS, at_long_side, corrupt, corruption_rng, image_key
from symphony_vlm.corruptions.sheet import draw_sheet
from symphony_vlm.errors import InputError

WITHOUT_FROST = [name for name in ALL if name != "frost"]


@pytest.fixture
def small(pattern: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """40 x 56 pixels in which no two parts are alike."""
    return np.ascontiguousarray(pattern[3:43, 5:61])


def _cell(image: NDArray[np.uint8], key: str, name: str, severity: int, seed: int = 0) -> NDArray[np.uint8]:
    return corrupt(image, name, severity, corruption_rng(key, name, severity, seed))


def _find(sheet: NDArray[np.uint8], picture: NDArray[np.uint8]) -> list[tuple[int, int]]:
    """Where a picture stands in a sheet, (top, left)."""
    height, width = picture.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (height, width), axis=(0, 1))
    first = (windows[..., 0, 0] == picture[0, 0]).all(axis=2) & (windows[..., -1, -1] == picture[-1, -1]).all(axis=2)
    return [
        (int(top), int(left))
        for top, left in np.argwhere(first)
        if np.array_equal(sheet[top : top + height, left : left + width], picture)
    ]


@pytest.mark.parametrize("names", [["fog", "gaussian_noise", "contrast"], WITHOUT_FROST], ids=["three", "all"])
def test_every_picture_stands_in_its_row_and_column(small: NDArray[np.uint8], names: list[str]) -> None:
    key = image_key(small)
    sheet = np.asarray(draw_sheet(small, names, key=key, seed=4, title="a title"))
    ((top, left),) = _find(sheet, small)
    assert top < 30, "the clean picture is first"
    rows: dict[str, tuple[int, int]] = {}
    for name in names:
        places = [_find(sheet, _cell(small, key, name, severity, 4)) for severity in range(1, 6)]
        assert all(places), name
        heights = set.intersection(*({row for row, _ in found} for found in places))
        assert len(heights) == 1, f"{name} is one row"
        (row,) = heights
        columns = [next(column for height, column in found if height == row) for found in places]
        assert set(np.diff(columns)) == {56 + 4}, "severities in ascending columns"
        rows[name] = (columns[0], row)
    assert rows["gaussian_noise"][0] == left, "under the clean picture"
    order = sorted(rows, key=lambda name: rows[name])
    families = [CORRUPTIONS[name].family for name in order]
    ordered = [family for family in ("noise", "blur", "weather", "digital") if family in families]
    assert list(dict.fromkeys(families)) == ordered, "families in one piece, left panel first"
    assert len({column for column, _ in rows.values()}) == (1 if len(names) == 3 else 2)


@pytest.mark.parametrize("size", [(1, 1), (3, 90), (90, 3)])
def test_any_size_is_drawn_with_room_for_the_names(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 128, np.uint8)
    sheet = draw_sheet(image, ["contrast", "jpeg_compression"], key=image_key(image), title="x" * 400)
    assert sheet.height > 60 and sheet.width > 120
    dark = (np.asarray(sheet.convert("L")) < 90).any(axis=0)
    assert dark.any() and not dark[:8].any() and not dark[-8:].any(), "nothing runs into the margin"


def test_an_unknown_name_is_refused(small: NDArray[np.uint8]) -> None:
    with pytest.raises(InputError, match="'fgo'; did you mean 'fog'"):
        draw_sheet(small, ["fgo"], key="")


@pytest.fixture
def file(small: NDArray[np.uint8], tmp_path: Path) -> Path:
    """The picture as a file."""
    path = tmp_path / "picture.png"
    Image.fromarray(small).save(path)
    return path


def _command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["corrupt", *arguments])
    return int(stop.value.code or 0), capsys.readouterr().err


def test_the_command_draws_at_a_size(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "folder" / "sheet.png"
    arguments = ["--grid", "--size", "28", "--seed", "2", "--corruption", "fog,pixelate", "--output", str(target)]
    assert _command(capsys, str(file), *arguments)[0] == 0
    resized, key = at_long_side(np.asarray(Image.open(file)), 28), image_key(file.read_bytes())
    sheet = np.asarray(Image.open(target))
    assert _find(sheet, _cell(resized, key, "fog", 3, 2)) and _find(sheet, resized)


def test_without_textures_the_stand_in_has_its_own_name(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYMPHONY_VLM_FROST_DIR", str(tmp_path))
    drawn: list[list[str]] = []

    def note(image: object, names: list[str], **settings: object) -> Image.Image:
        drawn.append(names)
        return Image.new("RGB", (2, 2))

    monkeypatch.setattr("symphony_vlm.corruptions.sheet.draw_sheet", note)
    sheet = tmp_path / "sheet.png"
    code, said = _command(capsys, str(file), "--grid", "--corruption", "common", "--output", str(sheet))
    assert code == 0 and "frost_procedural in the place of frost" in said and "SYMPHONY_VLM_FROST_DIR" in said
    assert drawn == [["frost_procedural" if name == "frost" else name for name in COMMON]]
    code, said = _command(capsys, str(file), "--grid", "--corruption", "fog,frost", "--output", str(sheet))
    assert code == 2 and "frost1.png is missing" in said, "who names frost gets frost or nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x.png"], "--corruption is not given"),
        (["--corruption", "fog", "--output", "x.png"], "--severity is not given"),
        (["--grid", "--severity", "1", "--output", "x.png"], "a sheet has all five severities"),
        (["--grid", "--corruption", "none", "--output", "x.png"], "a sheet needs a corruption"),
        (["--grid", "--output", "x.gif"], "'x.gif' ends with none of .png, .jpg, .jpeg, .webp"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: list[str], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = _command(capsys, str(file), *arguments)
    assert code == 2 and message in said


def test_one_picture_can_be_resized_first(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "one.webp"
    arguments = ["--corruption", "contrast", "--severity", "2", "--size", "20", "--output", str(target)]
    assert _command(capsys, str(file), *arguments)[0] == 0
    with Image.open(io.BytesIO(target.read_bytes())) as written:
        assert (written.format, written.size) == ("WEBP", (20, 14))
