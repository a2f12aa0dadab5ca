"""What one training or evaluation example is, whatever file it came from.

A reader (``datasets.py``) turns a record of any format into a `Sample`; everything downstream sees only this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["ImagePart", "ImageRef", "Message", "Role", "Sample", "TextPart"]

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True)
class ImageRef:
    """Where one image is: a file, or its encoded bytes (parquet, base64, an upload). Nothing is opened yet."""

    path: Path | None = None
    data: bytes | None = None
    name: str = ""
    """How messages name the image: the path as the record gave it, or e.g. ``row 12``."""


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """Literal text. Whatever it contains (``<image>``, ``</s>``, role markers) stays text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ImagePart:
    """The place of one image inside a message."""

    index: int
    """Index into `Sample.images`."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation, its text and images in order."""

    role: Role
    parts: tuple[TextPart | ImagePart, ...]

    @property
    def text(self) -> str:
        """The text parts joined, images left out."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation with its images."""

    id: str
    origin: str
    """File and record for error messages, e.g. ``train.json: record 12 (id 'a7')``."""
    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The record's other fields, e.g. ``source``, ``type``, ``label``."""
