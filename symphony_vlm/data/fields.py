"""Single values of a record: texts, and the many ways to give an image.

How text becomes an image, in this order:

1. ``data:image/...;base64,...`` is decoded.
2. ``file:///absolute/path`` is that path (Qwen's data sets write it); with a host it is refused.
3. Any other ``scheme://`` is a web address and refused: nothing is downloaded while training.
4. `is_base64_image` decides about bare base64; an existing file is never taken for it.
5. Everything else is a path, relative to the image folder unless absolute.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from symphony_vlm.data.images import image_from_base64, is_base64_image
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError

__all__ = ["ImageReader", "is_given", "shortened", "text_value"]

_scheme = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)


def shortened(value: object, limit: int = 60) -> str:
    """The value as Python writes it, cut to fit into a message."""
    if isinstance(value, (str, bytes)):
        value = value[:limit]  # writing out megabytes of base64 to throw them away takes its time
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def is_given(value: object) -> bool:
    """Whether a field says anything: tables fill what a row lacks with nulls, or with objects of nulls."""
    if isinstance(value, dict):
        return any(is_given(item) for item in value.values())
    return value is not None


def text_value(value: object, field: str, origin: str, *, required: bool) -> str:
    """A string that can be written as UTF-8, and is not blank if it is required (an answer)."""
    if not isinstance(value, str):
        raise InputError(f"field '{field}' is {shortened(value)}; it must be a string", where=origin, kind="value_type")
    if required and not value.strip():
        raise InputError(
            f"field '{field}' is {shortened(value)}; an answer must not be empty",
            where=origin,
            kind="empty_answer",
            remedy="There would be nothing to learn from it: fill it in, or remove the turn with its question.",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field '{field}' has half a surrogate pair at character {error.start}, which is no text",
            where=origin,
            kind="surrogate",
            remedy="Write the file again from the source text as UTF-8.",
        ) from error
    return value


class ImageReader:
    """Makes references of one record's image values. No image is opened.

    Args:
        origin: File and record, for messages.
        row: How an image without a name of its own is called, e.g. ``row 12``.
        folder: What relative paths are relative to. Absolute paths and ``..`` are the user's own business.
    """

    def __init__(self, *, origin: str, row: str, folder: Path) -> None:
        self.origin = origin
        self._row = row
        self._folder = folder

    def several(self, value: object, field: str) -> list[ImageRef]:
        """The record's own images: none, one, or a list of them."""
        if not is_given(value):
            return []
        if isinstance(value, list):
            return [self(item, f"{field}[{number}]") for number, item in enumerate(value)]
        return [self(value, field, name=self._row)]

    def __call__(self, item: Any, field: str, *, name: str | None = None) -> ImageRef:
        """One image: a path, a data URL, base64, encoded bytes, or the ``{bytes, path}`` of an image column."""
        name = name or f"{self._row}, {field}"
        if isinstance(item, dict) and (item.get("bytes") is not None or item.get("path") is not None):
            name = item.get("path") or name
            item = item["bytes"] if item.get("bytes") is not None else item["path"]
        if isinstance(item, bytes):
            return ImageRef(data=item, name=name)
        if not isinstance(item, str) or not item.strip():
            raise InputError(
                f"field '{field}' is {shortened(item)}; it must be a path, base64, encoded bytes, or a list of these",
                where=self.origin,
                kind="image_field",
                remedy="Leave the field out for a record without an image.",
            )
        if item[:5].lower() == "data:":
            return self.from_base64(item, field)
        if (scheme := _scheme.match(item)) is not None:
            return ImageRef(path=self._file_url(item, scheme[1], field), name=item)
        path = self._folder / item if len(item) <= _LONGEST_PATH else None
        if path is None or (is_base64_image(item) and not _exists(path)):
            return self.from_base64(item, field)
        return ImageRef(path=path, name=item)

    def from_base64(self, item: object, field: str) -> ImageRef:
        """An image that is known to be base64 text."""
        text = text_value(item, field, self.origin, required=False)
        try:
            return image_from_base64(text, name=f"{self.origin}, field '{field}'")
        except InputError as error:
            error.kind = "image_base64"
            raise

    def _file_url(self, url: str, scheme: str, field: str) -> Path:
        if scheme.lower() != "file":
            raise InputError(
                f"field '{field}' is the web address {shortened(url)}; nothing is downloaded while training",
                where=self.origin,
                kind="web_address",
                remedy="Download the image and give its path.",
            )
        host, slash, rest = url[len("file://") :].partition("/")
        if host not in ("", "localhost") or not slash:
            raise InputError(
                f"field '{field}' is {shortened(url)}, which names the host {host!r} instead of an absolute path",
                where=self.origin,
                remedy="Write file:///absolute/path, or the path alone if it is relative to the image folder.",
            )
        return Path(url2pathname(f"/{rest}"))


_LONGEST_PATH = 4096
"""Linux's PATH_MAX; no system takes longer ones, so that longer text can only be base64."""


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a part of it is longer than a file name may be
        return False
