"""Opening images: every pixel type becomes the right RGB, and whatever is broken says so."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from symphony_vlm.data.images import (
    MAX_SIDE,
    check_image_present,
    image_bytes,
    image_from_base64,
    image_key,
    image_size,
    load_image,
)
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ref(data: bytes) -> ImageRef:
    return ImageRef(data=data, name="row 12")


def pixels(data: bytes) -> np.ndarray:
    image = load_image(ref(data))
    assert image.mode == "RGB"
    return np.asarray(image)


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_with_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose data are a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


class TestPixels:
    def test_rgb_is_unchanged_from_file_and_from_bytes(self, tmp_path: Path) -> None:
        image = noise()
        path = tmp_path / "a.png"
        image.save(path)
        from_file = load_image(ImageRef(path=path, name="a.png"))
        assert np.array_equal(np.asarray(from_file), np.asarray(image))
        assert np.array_equal(pixels(path.read_bytes()), np.asarray(image))

    def test_transparent_rgba_becomes_white(self) -> None:
        image = Image.new("RGBA", (3, 1))
        image.putpixel((1, 0), (200, 0, 0, 255))
        image.putpixel((2, 0), (0, 0, 0, 128))
        assert pixels(encoded(image, "PNG"))[0].tolist() == [[255, 255, 255], [200, 0, 0], [127, 127, 127]]

    def test_transparent_grey_becomes_white(self) -> None:
        image = Image.new("LA", (2, 1), (0, 0))
        image.putpixel((1, 0), (9, 255))
        assert pixels(encoded(image, "PNG"))[0].tolist() == [[255, 255, 255], [9, 9, 9]]

    @pytest.mark.parametrize("transparency", [0, b"\x00\xff"], ids=["index", "alpha table"])
    def test_transparent_palette_becomes_white(self, transparency: int | bytes) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        data = encoded(image, "PNG", transparency=transparency)
        assert pixels(data)[0].tolist() == [[255, 255, 255], [40, 50, 60]]

    def test_opaque_palette_and_bilevel(self) -> None:
        image = Image.new("P", (1, 1))
        image.putpalette([10, 20, 30])
        assert pixels(encoded(image, "PNG"))[0, 0].tolist() == [10, 20, 30]
        assert pixels(encoded(Image.new("1", (1, 1), 1), "PNG"))[0, 0].tolist() == [255, 255, 255]

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bit_grey_is_scaled(self, kind: str) -> None:
        values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
        assert pixels(encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]

    def test_16_bit_grey_in_mode_i(self) -> None:
        pgm = b"P5 3 1 65535\n" + np.array([0, 32768, 65535], dtype=">u2").tobytes()
        assert Image.open(io.BytesIO(pgm)).mode == "I"
        assert pixels(pgm)[0, :, 1].tolist() == [0, 128, 255]

    def test_16_bit_grey_with_a_transparent_value(self) -> None:
        values = np.array([[1000, 65535, 0]], dtype=np.uint16)
        data = encoded(Image.fromarray(values), "PNG", transparency=1000)
        assert Image.open(io.BytesIO(data)).info["transparency"] == 1000
        assert pixels(data)[0, :, 0].tolist() == [255, 255, 0]

    def test_32_bit_grey_and_floats_have_no_defined_range(self) -> None:
        wide = encoded(Image.fromarray(np.array([[0, 70_000]], dtype=np.int32)), "TIFF")
        with pytest.raises(InputError, match=r"row 12.*0 to 70000.*Convert"):
            load_image(ref(wide))
        floats = encoded(Image.fromarray(np.array([[0.5]], dtype=np.float32)), "TIFF")
        with pytest.raises(InputError, match=r"row 12.*floating-point.*Convert"):
            load_image(ref(floats))

    def test_cmyk(self) -> None:
        data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
        red, green, blue = pixels(data)[4, 4].tolist()
        assert red > 250 and green < 5 and blue < 5

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied_once(self, orientation: int) -> None:
        upright = np.zeros((6, 10, 3), dtype=np.uint8)
        upright[:2, :3] = 255  # a mark in the upper left corner
        # How a camera stores the upright scene under each orientation (EXIF 2.3, tag 0x0112).
        stored = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, 1),
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = load_image(ref(encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)))
        assert np.array_equal(np.asarray(image), upright)
        assert not image.getexif() and not image.info

    def test_unreadable_exif_does_not_cost_the_image(self) -> None:
        data = encoded(noise(), "JPEG", exif=b"Exif\0\0garbage that is no TIFF header")
        assert load_image(ref(data)).size == (64, 48)

    def test_animation_gives_the_first_frame(self) -> None:
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "lime")]
        data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        assert pixels(data)[0, 0].tolist() == [255, 0, 0]

    @pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000)])
    def test_any_shape_is_accepted(self, size: tuple[int, int]) -> None:
        assert load_image(ref(encoded(Image.new("L", size, 7), "PNG"))).size == size


class TestFaults:
    def test_missing_file_names_record_path_and_remedy(self, tmp_path: Path) -> None:
        missing = ImageRef(path=tmp_path / "no.jpg", name="cats/no.jpg")
        for function in (load_image, image_bytes, check_image_present):
            with pytest.raises(InputError) as caught:
                function(missing)
            assert "'cats/no.jpg'" in str(caught.value) and str(tmp_path / "no.jpg") in str(caught.value)
            assert "does not exist" in str(caught.value) and "image folder" in str(caught.value)

    def test_folder_and_impossible_names(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder, not a file"):
            load_image(ImageRef(path=tmp_path, name="x"))
        for name in ("a\0b.png", "n" * 5000):
            with pytest.raises(InputError, match="cannot be opened|does not exist"):
                load_image(ImageRef(path=tmp_path / name, name="x"))
        with pytest.raises(InputError, match="neither a path nor bytes"):
            load_image(ImageRef(name="x"))

    def test_zero_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "empty.png"
        path.touch()
        for function in (load_image, image_bytes, check_image_present):
            with pytest.raises(InputError, match=r"empty\.png.*0 bytes.*on_bad_sample: skip"):
                function(ImageRef(path=path, name="empty.png"))

    @pytest.mark.parametrize(
        ("data", "found"),
        [
            (b"hello, this is text", "hello, this"),
            (b"<!DOCTYPE html><html>404</html>", "HTML page"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        ],
    )
    def test_not_an_image_says_what_was_found(self, data: bytes, found: str) -> None:
        with pytest.raises(InputError, match=f"row 12.*not an image.*{found}"):
            load_image(ref(data))

    @pytest.mark.parametrize("lenient", [False, True], ids=["Pillow strict", "Pillow lenient"])
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
    @pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
    def test_truncation_is_never_hidden(
        self, kind: str, kept: float, lenient: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = encoded(noise(), kind)
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
        with pytest.raises(InputError, match="row 12.*(truncated|not an image).*on_bad_sample: skip"):
            load_image(ref(data[: int(len(data) * kept)]))
        assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient  # another library's choice stays its own

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
    def test_cut_anywhere_gives_the_whole_image_or_an_input_error(self, kind: str) -> None:
        ramp = np.add.outer(np.arange(16) * 5, np.arange(24) * 7).astype(np.uint8)
        data = encoded(Image.fromarray(ramp), kind)
        whole = pixels(data)
        for length in range(len(data)):
            try:
                # Nothing is lost if the cut falls into a PNG's check sum after the last pixel.
                assert np.array_equal(pixels(data[:length]), whole)
            except InputError as error:
                assert "row 12" in str(error)

    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
    def test_damaged_bytes_give_an_image_or_an_input_error(self, kind: str) -> None:
        rng = np.random.default_rng(1)
        original = np.frombuffer(encoded(noise(16, 16), kind), dtype=np.uint8)
        for _ in range(100):
            data = original.copy()
            data[rng.integers(0, len(data), 5)] = rng.integers(0, 256, 5)
            try:
                load_image(ref(data.tobytes()), max_pixels=10**6)
            except InputError as error:
                assert "row 12" in str(error)

    @pytest.mark.parametrize("size", [(13_400, 13_400), (60_000, 60_000)], ids=["over ours", "over Pillow's"])
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_decompression_bomb_is_refused_by_its_header(self, size: tuple[int, int]) -> None:
        with pytest.raises(InputError, match=r"row 12.*pixels; the limit is 178,956,970.*Resize"):
            load_image(ref(png_with_size(*size)))

    def test_own_pixel_limit(self) -> None:
        data = encoded(Image.new("RGB", (20, 10)), "PNG")
        assert load_image(ref(data), max_pixels=200).size == (20, 10)
        with pytest.raises(InputError, match=r"20 x 10 = 200 pixels; the limit is 199"):
            load_image(ref(data), max_pixels=199)

    def test_a_side_beyond_the_limit_is_refused_and_one_at_it_is_not(self) -> None:
        data = encoded(Image.new("L", (MAX_SIDE, 1)), "PNG")
        assert load_image(ref(data)).size == (MAX_SIDE, 1) and image_size(ref(data)) == (1, MAX_SIDE)
        longer = ref(encoded(Image.new("L", (1, MAX_SIDE + 1)), "PNG"))
        for read in (load_image, image_size):
            with pytest.raises(InputError, match=r"row 12.*1 x 65,536 pixels; the limit is 65,535 a side.*Resize"):
                read(longer)

    def test_postscript_is_not_executed(self) -> None:
        with pytest.raises(InputError, match="EPS"):
            load_image(ref(encoded(noise(), "EPS")))


class TestSize:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
    @pytest.mark.parametrize("orientation", [None, *range(1, 9)])
    def test_the_header_has_the_size_of_the_upright_image(self, kind: str, orientation: int | None) -> None:
        exif = Image.Exif()
        if orientation is not None:
            exif[0x0112] = orientation
        data = encoded(noise(9, 5), kind, exif=exif)
        image = load_image(ref(data))
        assert image_size(ref(data)) == (image.height, image.width)
        assert (image.width == 5) is (orientation in (5, 6, 7, 8))

    @pytest.mark.parametrize("kind", ["GIF", "BMP", "PPM", "ICO"])
    def test_formats_without_an_orientation(self, kind: str) -> None:
        assert image_size(ref(encoded(noise(48, 32), kind))) == load_image(ref(encoded(noise(48, 32), kind))).size[::-1]

    def test_nothing_but_the_header_is_read(self) -> None:
        data = encoded(noise(64, 48), "JPEG")
        assert image_size(ref(data[: len(data) // 2])) == (48, 64)

    def test_what_cannot_be_read_is_refused_as_in_decoding(self) -> None:
        for data in (b"", b"no image", png_with_size(60_000, 60_000)):
            with pytest.raises(InputError, match="row 12"):
                image_size(ref(data))
        with pytest.raises(InputError, match="20 x 10 = 200 pixels; the limit is 199"):
            image_size(ref(encoded(Image.new("RGB", (20, 10)), "PNG")), max_pixels=199)


class TestBytesAndKeys:
    def test_image_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"abc")
        assert image_bytes(ImageRef(path=tmp_path / "a")) == b"abc" == image_bytes(ref(b"abc"))

    def test_key_of_paths_and_of_bytes(self) -> None:
        assert image_key(ImageRef(path=Path("a/../b.png"))) == image_key(ImageRef(path=Path("b.png"), name="x"))
        assert image_key(ImageRef(path=Path("b.png"))) != image_key(ImageRef(path=Path("c.png")))
        assert image_key(ref(b"abc")) == image_key(ImageRef(data=b"abc", name="y")) != image_key(ref(b"abd"))


class TestBase64:
    def test_plain_and_data_url(self) -> None:
        text = base64.b64encode(encoded(noise(), "PNG")).decode()
        wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
        for value in (text, wrapped, f"data:image/png;base64,{text}", f"data:image/png;name=a.png;base64,{wrapped}"):
            image = load_image(image_from_base64(value, name="upload"))
            assert np.array_equal(np.asarray(image), np.asarray(noise()))

    def test_size_limit_is_exact_and_checked_first(self) -> None:
        text = base64.b64encode(b"x" * 100).decode()
        assert image_from_base64(text, name="upload", max_bytes=100).data == b"x" * 100
        with pytest.raises(InputError, match="upload.*100 bytes; the limit is 99"):
            image_from_base64(text, name="upload", max_bytes=99)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("not base64!", "not valid base64"),
            ("abcdé", "not valid base64"),
            ("", "empty"),
            ("data:image/png;base64,", "empty"),
            ("data:image/png,abcd", "data URL begins with 'data:image/png'"),
            ("data:text/html;base64,abcd", "data URL begins with 'data:text/html;base64'"),
            ("https://example.org/a.png", "web address"),
        ],
    )
    def test_other_text_is_refused(self, value: str, message: str) -> None:
        with pytest.raises(InputError, match=f"upload.*{message}"):
            image_from_base64(value, name="upload")
