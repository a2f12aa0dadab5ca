"""Heat maps of the report: a number for every corruption and severity, tinted, with its interval and its mark.

A tint alone says nothing to many readers and to a printer: the sign stands before the number and an asterisk marks what
Holm's correction leaves significant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from symphony_vlm.evaluation.report_entries import Entry, Table, entry, p_text

__all__ = ["did_map", "difference_map", "retention_maps"]

Json = Mapping[str, Any]


def did_map(comparison: Json, scale: float) -> Table:
    """Difference in differences of every cell."""
    better, other = comparison["model"], comparison["baseline"]
    return _map(
        comparison["cells"],
        lambda cell, largest: _difference(
            cell, "did", scale, largest, {"p": "p", "Holm": "p_holm", "Benjamini-Hochberg": "p_bh"}
        ),
        key="did",
        title=f"Where {better} loses less than {other}: {comparison['task']}",
        caption=(
            "Difference in differences against clean in points, by corruption and severity, with 95 % intervals (not "
            f"adjusted). Blue and positive: {better} loses less; orange and negative: it loses more."
        ),
        largest=_largest(comparison["cells"], "did"),
    )


def difference_map(comparison: Json, scale: float) -> Table:
    """Plain difference of every cell."""
    better, other = comparison["model"], comparison["baseline"]
    tests = {"p": "difference_p", "Holm": "difference_p_holm", "McNemar": "mcnemar_p", "its Holm": "mcnemar_p_holm"}
    return _map(
        comparison["cells"],
        lambda cell, largest: _difference(cell, "difference", scale, largest, tests),
        key="differences",
        title=f"{better} minus {other} under each corruption: {comparison['task']}",
        caption=(
            f"{better} minus {other} in points, not against clean, with 95 % intervals (not adjusted). Blue and "
            f"positive: {better} is better."
        ),
        largest=_largest(comparison["cells"], "difference"),
    )


def retention_maps(models: Sequence[Json]) -> list[Table]:
    """Retention of every cell, one map for each model that has cells."""
    return [
        _map(
            model["cells"],
            _retention,
            key="retention",
            title=f"Retention of {model['label']}: {model['task']}",
            caption=("Corrupted / clean score in %, with 95 % intervals (not adjusted). The darker, the more is lost."),
            largest=1.0,
        )
        for model in models
        if model["cells"]
    ]


def _map(
    cells: Sequence[Json],
    shown: Callable[[Json, float], Entry],
    *,
    key: str,
    title: str,
    caption: str,
    largest: float,
) -> Table:
    by_cell = {(cell["corruption"], cell["severity"]): cell for cell in cells}
    severities = sorted({severity for _, severity in by_cell})
    lines: list[tuple[Entry, ...]] = []
    for name in dict.fromkeys(corruption for corruption, _ in by_cell):
        line = [Entry(main=name.replace("_", " "))]
        for severity in severities:
            cell = by_cell.get((name, severity))
            line.append(shown(cell, largest) if cell else Entry(main="–", note="not evaluated"))
        lines.append(tuple(line))
    family = f"* p below 0.05 after Holm's correction over {len(by_cell)} cells."
    return Table(
        key=key,
        title=title,
        caption=f"{caption} {family}",
        header=("corruption", *(f"severity {severity}" for severity in severities)),
        rows=tuple(lines),
    )


def _largest(cells: Sequence[Json], figure: str) -> float:
    return max((abs(cell[figure]["value"] or 0.0) for cell in cells), default=0.0) or 1.0


def _difference(cell: Json, figure: str, scale: float, largest: float, tests: Mapping[str, str]) -> Entry:
    value = cell[figure]["value"]
    base = entry(cell[figure], scale=scale, signed=True, tint=0.0 if value is None else value / largest)
    return _marked(base, cell, tests)


def _retention(cell: Json, largest: float) -> Entry:
    value = cell["retention"]["value"]
    lost = 0.0 if value is None else max(-1.0, min(0.0, value - largest))
    return _marked(entry(cell["retention"], tint=lost), cell, {"p": "sign_flip_p", "Holm": "sign_flip_p_holm"})


def _marked(base: Entry, cell: Json, tests: Mapping[str, str]) -> Entry:
    """With an asterisk where Holm's correction leaves it significant, and the p-values on hover."""
    adjusted = cell.get(tests["Holm"])
    star = "*" if adjusted is not None and adjusted < 0.05 else ""
    told = ", ".join(f"{name} {p_text(cell.get(field))}" for name, field in tests.items())
    return Entry(main=base.main + star, interval=base.interval, note=base.note or told, tint=base.tint)
