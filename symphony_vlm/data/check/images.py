"""One picture: can it be used, and if not, what is it instead? The verdict is training's own, from `load_image`."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from symphony_vlm.data.images import MAX_PIXELS, check_image_present, image_bytes, load_image
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError

__all__ = ["ImageFinding", "ImageLimits", "check_image", "check_presence"]

_NOT_PIXELS = ("EPS", "WMF")


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What a picture may be at most."""

    max_pixels: int = MAX_PIXELS
    """Width times height."""
    max_bytes: int | None = None
    """Size of the encoded picture."""
    max_aspect_ratio: float | None = None
    """Longer side over shorter side."""
    min_side: int = 1
    """Shorter side in pixels."""


@dataclass(frozen=True, kw_only=True)
class ImageFinding:
    """What was found out about one picture."""

    kind: str | None = None
    """Kind of fault, or None for a good picture."""
    reason: str = ""
    width: int = 0
    height: int = 0
    """In pixels, upright; 0 if it was not decoded."""
    digest: bytes | None = None
    """16 bytes of BLAKE2b over the encoded picture; None if it was not read."""


def check_image(ref: ImageRef, limits: ImageLimits) -> ImageFinding:
    """Read and decode a picture. Never raises `InputError`: what is wrong is in the finding."""
    try:
        _check_bytes(ref, limits)
        data = image_bytes(ref)
    except InputError as error:
        return ImageFinding(kind=error.kind or _kind_of_file(ref), reason=str(error))
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        # From memory, so that the file is read once; the path is kept for messages.
        image = load_image(ImageRef(data=data, path=ref.path, name=ref.name), max_pixels=limits.max_pixels)
    except InputError as error:
        return ImageFinding(kind=_kind_of_content(data, limits), reason=str(error), digest=digest)
    problem = _shape_problem(image.width, image.height, limits)
    reason = (
        str(InputError(problem, where=_where(ref), remedy="Correct the file, or raise the limit.")) if problem else ""
    )
    return ImageFinding(
        kind="image_shape" if problem else None, reason=reason, width=image.width, height=image.height, digest=digest
    )


def check_presence(ref: ImageRef) -> ImageFinding:
    """Only look whether there are bytes to decode."""
    try:
        check_image_present(ref)
    except InputError as error:
        return ImageFinding(kind=_kind_of_file(ref), reason=str(error))
    return ImageFinding()


def _check_bytes(ref: ImageRef, limits: ImageLimits) -> None:
    """The size, before anything is read."""
    if limits.max_bytes is None:
        return
    if ref.data is not None:
        size = len(ref.data)
    elif ref.path is not None:
        try:
            size = ref.path.stat().st_size
        except (OSError, ValueError):
            return  # `image_bytes` says what is wrong with it
    else:
        return
    if size > limits.max_bytes:
        raise InputError(
            f"has {size:,} bytes; the limit is {limits.max_bytes:,}",
            where=_where(ref),
            remedy="Save it smaller, or raise the limit.",
            kind="image_bytes",
        )


def _where(ref: ImageRef) -> str:
    return f"image {ref.name!r}" + (f" ({ref.path})" if ref.path is not None and ref.name != str(ref.path) else "")


def _shape_problem(width: int, height: int, limits: ImageLimits) -> str | None:
    ratio = max(width, height) / min(width, height)
    if limits.max_aspect_ratio is not None and ratio > limits.max_aspect_ratio:
        return f"is {width} x {height}, {ratio:.0f} times as long as wide; the limit is {limits.max_aspect_ratio:g}"
    if min(width, height) < limits.min_side:
        return f"is {width} x {height}; the shorter side must have at least {limits.min_side} pixels"
    return None


def _kind_of_file(ref: ImageRef) -> str:
    """Why there are no bytes."""
    if ref.data is not None or ref.path is None:
        return "image_empty"
    try:
        if not ref.path.exists():
            return "image_missing"
        if not ref.path.is_file():
            return "image_not_a_file"
        return "image_unreadable" if ref.path.stat().st_size else "image_empty"
    except (OSError, ValueError):
        return "image_unreadable"


def _kind_of_content(data: bytes, limits: ImageLimits) -> str:
    """Why bytes that are there are no usable picture."""
    if data[:512].lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "image_html"
    if data.startswith(b"version https://git-lfs"):
        return "image_lfs_pointer"
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format in _NOT_PIXELS:  # decoding these runs other programs
                return "image_unsupported"
            if image.width * image.height > limits.max_pixels:
                return "image_pixels"
            image.load()
    except Image.DecompressionBombError:
        return "image_pixels"
    except UnidentifiedImageError:
        return "image_unknown"
    except MemoryError:
        raise
    except Exception:  # Pillow's decoders meet damaged data with almost any exception
        return "image_damaged"
    # It decodes: its pixels have no defined brightness.
    return "image_unsupported"
