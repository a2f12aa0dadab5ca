"""The report's sections: one function each, from the merged results to HTML. Everything read from a file is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from symphony_vlm.evaluation.report_data import ReportData
from symphony_vlm.evaluation.report_figures import Series, legend, severity_panel
from symphony_vlm.evaluation.report_gallery import gallery
from symphony_vlm.evaluation.report_page import section
from symphony_vlm.evaluation.report_provenance import methods, provenance_table
from symphony_vlm.evaluation.report_routing import routing_section
from symphony_vlm.evaluation.report_samples import SampleChoice
from symphony_vlm.evaluation.report_tables import Table, to_html
from symphony_vlm.evaluation.report_training import expert_graphs, expert_load, loss_curves
from symphony_vlm.evaluation.report_verdict import verdict
from symphony_vlm.evaluation.robustness import CLEAN, corrupted_cells

__all__ = ["build_sections", "severity_curves"]

Json = Mapping[str, Any]


def build_sections(
    data: ReportData,
    robustness: Json,
    tables: Sequence[Table],
    samples: Sequence[SampleChoice],
    warnings: Sequence[str],
) -> list[tuple[str, str, str]]:
    """(key, title, HTML) of every section that has something to show, in the page's order."""
    several = len({scores.task for scores in data.scores}) > 1
    by_key = {
        key: "".join(to_html(table, heading=several or key == "attacks") for table in tables if table.key == key)
        for key in ("clean", "groups", "robustness", "seeds", "attacks")
    }
    # These are several of a task (one a model, or two kinds), so that each keeps its heading.
    by_key["retention"] = _with_headings(tables, "retention")
    parts = [
        ("verdict", "Verdict", verdict(robustness), ""),
        ("warnings", "Read this first", _warnings(warnings), "warnings"),
        ("clean", "Clean accuracy", by_key["clean"], ""),
        ("types", "Accuracy by question type", by_key["groups"], ""),
        ("severity", "Severity curves", severity_curves(data, robustness), ""),
        ("robustness", "Robustness", by_key["robustness"], ""),
        ("retention", "Retention by corruption and severity", by_key["retention"], ""),
        ("difference", "Model against baseline", _differences(tables), ""),
        ("attacks", "Attacks", by_key["attacks"], ""),
        ("loss", "Training loss", loss_curves(data), ""),
        ("load", "Expert load", expert_load(data), ""),
        ("graph", "Expert graph", expert_graphs(data), ""),
        ("routing", "Inside the routers", routing_section(data, tables), ""),
        ("seeds", "Several training runs", by_key["seeds"], ""),
        ("samples", "Flipped answers", gallery(samples), ""),
        ("methods", "Provenance and methods", provenance_table(data) + methods(robustness), ""),
    ]
    return [(key, title, section(key, title, body, kind=kind)) for key, title, body, kind in parts if body]


def _warnings(warnings: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(text)}</li>' for text in warnings)}</ul>" if warnings else ""


def severity_curves(data: ReportData, robustness: Json) -> str:
    """One panel per corruption, all models, with interval bands; severity 0 is the clean cell on the same items."""
    blocks: list[str] = []
    for task in dict.fromkeys(scores.task for scores in data.scores):
        models = [scores for scores in data.scores if scores.task == task]
        cells = corrupted_cells({cell for scores in models for cell in scores.values})
        names = list(dict.fromkeys(name for name, _ in cells))
        if not names:
            continue
        rows = _rows_by_cell(data, task, models[0].metric)
        for block in (b for b in robustness["models"] if b["task"] == task and b["n_items"] != b["n_clean_items"]):
            on_scale = {k: v * block["best"] for k, v in block["clean"].items() if isinstance(v, float)}
            rows[block["label"], CLEAN[0], CLEAN[1]] = {**block["clean"], **on_scale}
        scale = 100.0 if all(0 <= (row["value"] or 0) <= 1 for row in rows.values()) else 1.0
        limits = _limits(rows.values(), scale)
        styles = {model.label: style for style, model in enumerate(data.models)}
        panels = []
        for name in names:
            series = [_curve(rows, s.label, styles[s.label], name, scale) for s in models]
            ylabel = f"{models[0].metric}{', %' if scale == 100.0 else ''}"
            panels.append(severity_panel(title=name.replace("_", " "), series=series, limits=limits, ylabel=ylabel))
        heading = f"<h3>{html.escape(task)}</h3>" if len({s.task for s in data.scores}) > 1 else ""
        caption = "Bands: 95 % intervals of each model by itself; overlapping bands do not decide a paired difference."
        blocks.append(
            f"{heading}{legend([m.label for m in data.models])}"
            f'<div class="panels">{"".join(panels)}</div><p class="caption">{caption}</p>'
        )
    return "".join(blocks)


def _rows_by_cell(data: ReportData, task: str, metric: str) -> dict[tuple[str, str, int], Json]:
    labels = {(m.model, m.router): m.label for m in data.models}
    return {
        (labels[row["model"], row["router"] or "none"], row["corruption"], row["severity"]): row
        for row in data.rows
        if row["metric"] == metric and task in (row["task"], f"{row['task']}/{row.get('split')}")
    }


def _curve(rows: Mapping[tuple[str, str, int], Json], label: str, style: int, name: str, scale: float) -> Series:
    clean = (label, CLEAN[0], CLEAN[1])
    points = {0: rows[clean]} if clean in rows else {}
    points |= {s: row for (owner, corruption, s), row in sorted(rows.items()) if (owner, corruption) == (label, name)}

    def scaled(key: str) -> list[float | None]:
        return [None if row.get(key) is None else scale * row[key] for row in points.values()]

    return Series(
        label=label, style=style, x=list(points), y=scaled("value"), low=scaled("ci_low"), high=scaled("ci_high")
    )


def _limits(rows: Any, scale: float) -> tuple[float, float]:
    """The same axis in every panel, or the panels could not be compared."""
    keys = ("value", "ci_low", "ci_high")
    values = [scale * row[key] for row in rows for key in keys if row.get(key) is not None] or [0.0, scale]
    margin = 0.05 * (max(values) - min(values)) or 1.0
    low, high = min(values) - margin, max(values) + margin
    return (max(0.0, low), min(100.0, high)) if scale == 100.0 else (low, high)


def _differences(tables: Sequence[Table]) -> str:
    return _with_headings(tables, "summary", "did", "differences")


def _with_headings(tables: Sequence[Table], *keys: str) -> str:
    return "".join(to_html(table) for table in tables if table.key in keys)
