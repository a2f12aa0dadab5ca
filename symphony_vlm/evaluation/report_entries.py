"""What a table of the report is made of, whatever it is written as: numbers with their intervals, and headings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Entry", "Table", "entry", "figure_of", "p_text"]

Json = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell of a table."""

    main: str
    interval: str = ""
    note: str = ""
    """Shown on hover; the reason of a missing number."""
    tint: float = 0.0
    """-1 (worse than the baseline) to 1 (better): the colour behind the number."""

    @property
    def text(self) -> str:
        """Number and interval."""
        return f"{self.main} {self.interval}".strip()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its heading and what a reader must know to read it."""

    key: str
    """Which section shows it, and its style: clean, groups, robustness, retention, summary, did, differences, seeds."""
    title: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]


def figure_of(value: float | None, *, scale: float = 100.0, signed: bool = False, digits: int = 1) -> str:
    """A number as printed: percent (or points) unless ``scale`` says otherwise, a real minus sign, – for null."""
    if value is None:
        return "–"
    text = f"{value * scale:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def entry(number: Json, *, scale: float = 100.0, signed: bool = False, digits: int = 1, tint: float = 0.0) -> Entry:
    """The cell of a ``{"value", "ci_low", "ci_high"}``; a missing interval is said, not left out silently."""
    value, low, high = (number.get(key) for key in ("value", "ci_low", "ci_high"))
    main = figure_of(value, scale=scale, signed=signed, digits=digits)
    note = str(number.get("reason") or "")
    if value is None or low is None or high is None:
        return Entry(main=main, note=note or ("no interval" if value is not None else "not available"))
    ends = (figure_of(end, scale=scale, signed=signed, digits=digits) for end in (low, high))
    return Entry(main=main, interval=f"[{', '.join(ends)}]", note=note, tint=tint)


def p_text(p: float | None) -> str:
    """A p-value as printed."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
