"""Fields of a record that may be missing, each of the type it must have: else an error that names record and field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from symphony_vlm.data.fields import shortened
from symphony_vlm.evaluation.rows import Row

__all__ = ["number_or_none", "object_or_empty", "text_or_none", "texts"]


def text_or_none(row: Row, *names: str) -> str | None:
    """The first of the fields that is there, as text; None if none is, or if it is empty."""
    given = [name for name in names if row.fields.get(name) is not None]
    return (row.text(given[0]) or None) if given else None


def texts(row: Row, name: str) -> tuple[str, ...]:
    """A list of texts; empty if the field is missing. Numbers are written out."""
    values = row.fields.get(name)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(_is_text(value) for value in values):
        raise row.error(f"field {name!r} is {shortened(values)}; it must be a list of texts")
    return tuple(map(str, values))


def object_or_empty(row: Row, name: str) -> Mapping[str, Any]:
    """An object; empty if the field is missing."""
    value = row.fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise row.error(f"field {name!r} is {shortened(value)}; it must be an object")
    return value


def number_or_none(row: Row, name: str) -> float | None:
    """A finite number; None if the field is missing."""
    value = row.fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise row.error(f"field {name!r} is {shortened(value)}; it must be a number")
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)
