"""What a string in an image field is: a path, a URL or base64."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from symphony_vlm.data.fields import ImageReader
from symphony_vlm.data.images import is_base64_image, load_image
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError


def read(value: object, folder: Path = Path("/images")) -> ImageRef:
    return ImageReader(origin="a.json: record 3", row="row 3", folder=folder)(value, "image")


def encoded(image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, image_format)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("width", [0, 76, 64])
def test_bare_base64_of_every_format(image_format: str, width: int) -> None:
    data = encoded(image_format)
    value = base64.b64encode(data).decode()
    if width:
        value = "\r\n".join(value[start : start + width] for start in range(0, len(value), width)) + "\n"
    ref = read(value)
    assert ref.data == data and ref.path is None and len(ref.name) < 60
    assert load_image(ref).size == (8, 8)


@pytest.mark.parametrize(
    "path",
    [
        "a.png",
        "/9j/photos/" + "a" * 80 + ".jpg",
        "/9j/4AAQSkZJRg",
        "iVBORw0KGgo/" + "images/" * 10 + "a.png",
        "QkFTRQ" + "a" * 80,
        "UklGRabcdefgh" + "x" * 80,
        "R0lGOD" + "z" * 20,
        "R0lGOD/" + "cats/" * 20 + "1",
        "a" * 200,
        "train2017/000000123456",
    ],
)
def test_paths_stay_paths(path: str) -> None:
    ref = read(path)
    assert ref.path == Path("/images") / path and ref.data is None


@given(st.text("abcdefghij/_.-019QkVBORwR0lGODUklGR+", min_size=1, max_size=300))
def test_a_name_with_a_dot_dash_or_underscore_is_never_base64(name: str) -> None:
    if set(name) & set("._-"):
        assert not is_base64_image(name)


def test_an_existing_file_wins_over_base64(tmp_path: Path) -> None:
    name = base64.b64encode(encoded("GIF")[:60]).decode().replace("/", "a")
    assert is_base64_image(name) and read(name, tmp_path).data is not None
    (tmp_path / name).write_bytes(b"x")
    assert read(name, tmp_path).path == tmp_path / name


def test_damaged_and_large_base64_is_an_error_not_a_path() -> None:
    value = base64.b64encode(encoded("BMP") * 30).decode()
    assert len(value) > 4096
    with pytest.raises(InputError, match=r"a\.json: record 3, field 'image': the image is not valid base64") as caught:
        read(value[:-1] + "!")
    assert len(str(caught.value)) < 300
    large = base64.b64encode(encoded("BMP") + bytes(21 * 2**20)).decode()
    with pytest.raises(InputError, match="the limit is 20,971,520"):
        read(large)


def test_file_urls() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a b#1.png"
        path.write_bytes(encoded("PNG"))
        for url in (f"file://{folder}/a%20b%231.png", f"FILE://localhost{folder}/a%20b%231.png", path.as_uri()):
            ref = read(url, Path("/elsewhere"))
            assert ref.path is not None and ref.path.samefile(path)
    for url in ("file://images/a.png", "file://a.png"):
        with pytest.raises(InputError, match=r"names the host '(images|a\.png)' instead of an absolute path"):
            read(url)


@pytest.mark.parametrize("url", ["https://x/a.png", "HTTP://x/a.png", "s3://bucket/a.png", "hf://datasets/a/b.png"])
def test_web_addresses_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="field 'image' is the web address .* nothing is downloaded while training"):
        read(url)


def test_an_image_column_without_bytes_and_path_is_no_image() -> None:
    reader = ImageReader(origin="a", row="row 0", folder=Path())
    assert reader.several({"bytes": None, "path": None}, "image") == []
    with pytest.raises(InputError, match=r"field 'image\[1\]' is \{'bytes': None, 'path': None\}"):
        reader.several(["a.png", {"bytes": None, "path": None}], "image")
