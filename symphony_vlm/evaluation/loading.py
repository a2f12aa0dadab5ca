"""What the loaders of benchmarks share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from symphony_vlm.data.fields import shortened
from symphony_vlm.data.images import image_key
from symphony_vlm.data.sample import ImageRef
from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.item import EvaluationItem

__all__ = ["key_of", "needed", "unique", "whole_number"]


def needed(data: Path | None, what: str) -> Path:
    """The data that was given, or the error that says what to give."""
    if data is None:
        raise InputError("this task needs its data", where="--data", remedy=f"Give {what}.")
    return data


def key_of(images: Sequence[ImageRef], name: str) -> str:
    """The key of an item's pictures, or that name if there are none."""
    return "+".join(image_key(ref) for ref in images) or f"id:{name}"


def whole_number(text: str) -> int | None:
    """The number that a text of up to 18 digits writes, else None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def unique(items: Iterable[EvaluationItem], where: Path) -> list[EvaluationItem]:
    """The items as a list.

    Raises:
        InputError: Two of them have the same id.
    """
    found: dict[str, EvaluationItem] = {}
    for item in items:
        if item.id in found:
            raise InputError(
                f"the question {shortened(item.id)} stands twice", where=str(where), remedy="Keep it once, or give ids."
            )
        found[item.id] = item
    return list(found.values())
