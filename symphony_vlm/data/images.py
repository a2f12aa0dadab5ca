"""From a reference to pixels: one way to open an image, for training, clean and corrupted evaluation, and serving.

Every image becomes upright 8-bit RGB by the same rules (``pixels.py``), so that a score never depends on which code
opened the file. Of an animation or a multi-page file the first frame counts. Whatever cannot be decoded completely is
an `InputError`: a half-grey picture never reaches a model.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

from PIL import Image, ImageFile, UnidentifiedImageError

from symphony_vlm.data.pixels import to_upright_rgb, upright_size
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE",
    "ImageLike",
    "check_image_present",
    "image_bytes",
    "image_from_base64",
    "image_key",
    "image_size",
    "is_base64_image",
    "load_image",
    "open_image",
]

MAX_PIXELS = 178_956_970
"""Pillow refuses more than this (about 0.5 GB of RGB) as a decompression bomb; a larger limit has no effect."""

MAX_SIDE = 65_535
"""JPEG's own limit. A picture of one line and millions of columns is small, but not what is made of it."""

_REDUCE = "Resize it (vision encoders see a few hundred pixels a side), or leave the record out (on_bad_sample: skip)."
_REPLACE = "Replace the file, or leave the record out (on_bad_sample: skip)."

# Pillow decodes these by running other programs or drawing commands; a data set or an upload must not be able to.
_REFUSED_FORMATS = frozenset({"EPS", "WMF"})


def load_image(ref: ImageRef, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to upright RGB, by the rules of ``pixels.py``.

    Args:
        ref: The image; its bytes win over its path if it has both.
        max_pixels: Width times height above which the image is refused by its header, before anything is decoded. So
            is one with a side above `MAX_SIDE`; within these limits any aspect ratio is good.

    Returns:
        A new RGB image without metadata (so that nobody can apply the EXIF orientation a second time).

    Raises:
        InputError: Missing, empty, not an image, truncated, damaged, too large, or of a pixel type without a defined
            range. Names the image, what was found and what to do.
    """
    with _open_stream(ref) as stream, _strict_decoding():
        image = _open_header(stream, ref)
        _check_size(image, ref, max_pixels)
        try:
            image.load()
            return to_upright_rgb(image)
        except InputError as error:
            raise InputError(error.problem, where=_where(ref), remedy=error.remedy) from error
        except MemoryError:
            raise
        # Pillow's decoders meet damaged data with almost any exception (struct.error, IndexError, SyntaxError ...).
        except Exception as error:
            raise _damaged(ref, image, stream, error) from error


def image_size(ref: ImageRef, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of what `load_image` returns, read from the header (of PNG without EXIF: after decoding).

    Raises:
        InputError: Missing, empty, not an image, or too large, as in `load_image`.
    """
    with _open_stream(ref) as stream, _strict_decoding():
        image = _open_header(stream, ref)
        _check_size(image, ref, max_pixels)
        try:
            return upright_size(image)
        except MemoryError:
            raise
        except Exception as error:
            raise _damaged(ref, image, stream, error) from error


def image_bytes(ref: ImageRef) -> bytes:
    """The encoded bytes, for content hashes.

    Raises:
        InputError: The file is missing, unreadable or empty.
    """
    with _open_stream(ref) as stream:
        return stream.read()


def check_image_present(ref: ImageRef) -> None:
    """Check that there are bytes to decode, without reading them.

    Raises:
        InputError: The file is missing, unreadable or empty.
    """
    _open_stream(ref).close()


def image_key(ref: ImageRef) -> str:
    """What makes two references the same image: the normalised path, or the hash of the bytes."""
    if ref.data is not None:
        return f"sha256:{hashlib.sha256(ref.data).hexdigest()}"
    return f"path:{os.path.normpath(ref.path or '')}"


def image_from_base64(text: str, *, name: str, max_bytes: int = 20 * 2**20) -> ImageRef:
    """An image from base64 text, with or without a ``data:image/...;base64,`` header.

    Args:
        text: The encoded image; white space inside is ignored.
        name: How messages shall name it.
        max_bytes: Limit on the decoded size, checked before decoding.

    Raises:
        InputError: Not base64, a data URL of another kind, a web address, empty or too large.
    """
    payload = text.strip()
    if payload[:5].lower() == "data:":
        header, comma, payload = payload.partition(",")
        media_type, *options = header[5:].lower().split(";")
        if not comma or "base64" not in options or not media_type.startswith("image/"):
            raise InputError(
                f"the data URL begins with {header[:60]!r}; it must begin with 'data:image/<type>;base64,'", where=name
            )
    elif payload[:8].lower().startswith(("http://", "https://")):
        raise InputError(
            f"{payload[:60]!r} is a web address, not an image", where=name, remedy="Download the image and send it."
        )
    payload = "".join(payload.split())
    size = len(payload) * 3 // 4 - payload[-2:].count("=")
    if size > max_bytes:
        raise InputError(f"the image has {size:,} bytes; the limit is {max_bytes:,}", where=name)
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the image is not valid base64 ({error})", where=name) from error
    if not data:
        raise InputError("the image is empty (0 bytes)", where=name)
    return ImageRef(data=data, name=name)


_base64_text = re.compile(r"[A-Za-z0-9+/]{32}[A-Za-z0-9+/\r\n]{28,}={0,2}").fullmatch


def is_base64_image(text: str) -> bool:
    """Whether text is an encoded image in base64 (tables of benchmarks hold them so) rather than a path.

    It must have 60 characters or more, only those of the base64 alphabet and line breaks (a file name's extension has a
    dot, which is not among them), and its first bytes must be the signature of a JPEG (text ``/9j/``), PNG (``iVBOR``),
    GIF (``R0lGOD``), WebP (``UklGR``), BMP (``Qk``) or TIFF (``SUkqA``, ``TU0AK``) file. A prefix as short as ``Qk``
    alone would catch names, so the signature is compared whole: BMP's four zero bytes, WebP's second word.
    """
    text = text.strip()
    if _base64_text(text) is None:
        return False
    head = base64.b64decode(text[:32])
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
    )


def _where(ref: ImageRef) -> str:
    if ref.path is None or ref.name == str(ref.path):
        return f"image {ref.name!r}" if ref.name else "image given as bytes"
    return f"image {ref.name!r} ({ref.path})" if ref.name else f"image {str(ref.path)!r}"


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__


def _size(stream: BinaryIO) -> int:
    return stream.seek(0, io.SEEK_END)


def _open_stream(ref: ImageRef) -> BinaryIO:
    if ref.data is not None:
        stream: BinaryIO = io.BytesIO(ref.data)
    elif ref.path is not None:
        stream = _open_file(ref, ref.path)
    else:
        raise InputError("has neither a path nor bytes", where=_where(ref))
    if _size(stream) == 0:
        stream.close()
        raise InputError("is empty (0 bytes); an encoded image is required", where=_where(ref), remedy=_REPLACE)
    stream.seek(0)
    return stream


def _open_file(ref: ImageRef, path: Path) -> BinaryIO:
    try:
        # Opening a pipe or a device would wait for ever; opening a folder fails with a text that differs by system.
        if path.exists() and not path.is_file():
            raise InputError(f"is a {'folder' if path.is_dir() else 'special file'}, not a file", where=_where(ref))
        return path.open("rb")
    except FileNotFoundError as error:
        raise InputError(
            "the file does not exist",
            where=_where(ref),
            remedy="Place it there, set the image folder that paths are relative to, or leave the record out "
            "(on_bad_sample: skip).",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise InputError(f"the file cannot be opened: {_describe(error)}", where=_where(ref)) from error


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Switch off Pillow's process-wide leniency, which some libraries switch on at import, and put it back after.

    With it a truncated photo decodes "successfully" with a grey lower half.
    """
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = True


def _open_header(stream: BinaryIO, ref: ImageRef) -> Image.Image:
    try:
        image = Image.open(stream)
    except Image.DecompressionBombError as error:
        raise _too_large(ref, "more", MAX_PIXELS) from error
    except UnidentifiedImageError as error:
        stream.seek(0)
        raise InputError(
            f"is not an image: {_describe_start(stream.read(64))}", where=_where(ref), remedy=_REPLACE
        ) from (error)
    except MemoryError:
        raise
    except Exception as error:  # the same variety as in decoding
        raise InputError(
            f"the image header ({_size(stream):,} bytes in all) is truncated or damaged: {_describe(error)}",
            where=_where(ref),
            remedy=_REPLACE,
        ) from error
    if image.format in _REFUSED_FORMATS:
        raise InputError(
            f"is {image.format}, a drawing program rather than pixels", where=_where(ref), remedy="Convert it to PNG."
        )
    return image


def _damaged(ref: ImageRef, image: Image.Image, stream: BinaryIO, error: Exception) -> InputError:
    return InputError(
        f"the {image.format} data ({_size(stream):,} bytes) is truncated or damaged: {_describe(error)}",
        where=_where(ref),
        remedy=_REPLACE,
    )


def _check_size(image: Image.Image, ref: ImageRef, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise _too_large(ref, f"{image.width} x {image.height} = {image.width * image.height:,}", max_pixels)
    if max(image.size) > MAX_SIDE:
        raise InputError(
            f"has {image.width:,} x {image.height:,} pixels; the limit is {MAX_SIDE:,} a side",
            where=_where(ref),
            remedy=_REDUCE,
        )


def _too_large(ref: ImageRef, found: str, max_pixels: int) -> InputError:
    return InputError(
        f"has {found} pixels; the limit is {max_pixels:,}",
        where=_where(ref),
        remedy=_REDUCE,
    )


def _describe_start(head: bytes) -> str:
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is an HTML page, perhaps saved by a failed download"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the real file with 'git lfs pull'"
    return f"no known image format begins with {head[:16]!r}"


ImageLike: TypeAlias = str | Path | Image.Image
"""What functions for people accept as an image."""


def open_image(image: ImageLike) -> Image.Image:
    """A file or a Pillow image as upright RGB, by the rules of `load_image`."""
    if isinstance(image, Image.Image):
        return to_upright_rgb(image)
    return load_image(ImageRef(path=Path(image), name=str(image)))
