"""The report's table of several training runs of one router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from symphony_vlm.evaluation.report_entries import Entry, Table, entry

__all__ = ["seed_table"]

Json = Mapping[str, Any]


def seed_table(robustness: Json, task: str, scale: float) -> Table | None:
    """Intervals over training runs; None where no router has two."""
    blocks = [block for block in robustness["seeds"] if block["task"] == task]
    if not blocks:
        return None
    rows = (
        ("Clean score", "clean", scale),
        ("Mean corrupted score", "mean_corrupted", scale),
        ("Drop, points", "drop", scale),
        ("Retention, %", "retention", 100.0),
    )
    lines = [
        (Entry(main=title), *(entry(block[figure], scale=factor) for block in blocks)) for title, figure, factor in rows
    ]
    compared = [block.get("difference_in_differences") for block in blocks]
    if any(compared):
        first = next(block["baseline"] for block in blocks if "baseline" in block)
        numbers = (entry(d, scale=scale, signed=True) if d else Entry(main="–", note="the baseline") for d in compared)
        lines.append((Entry(main=f"Loses less than {first} by, points"), *numbers))
    return Table(
        key="seeds",
        title=f"Over training runs: {task}",
        caption=(
            "Mean over the runs and 95 % interval: Student's t over runs, Welch's for the difference. A run counts "
            "once, however many pictures it saw; intervals over images (above) are about single runs."
        ),
        header=("quantity", *(f"{block['router']} ({len(block['runs'])} runs)" for block in blocks)),
        rows=tuple(lines),
    )
