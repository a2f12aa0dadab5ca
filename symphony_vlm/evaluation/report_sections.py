"""The report's sections: one function each, from the merged results to HTML. Everything read from a file is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from symphony_vlm.evaluation.report_data import ReportData
from symphony_vlm.evaluation.report_figures import Series, legend, severity_panel
from symphony_vlm.evaluation.report_page import section
from symphony_vlm.evaluation.report_routing import routing_section
from symphony_vlm.evaluation.report_samples import FlippedSample, SampleChoice
from symphony_vlm.evaluation.report_tables import Table, figure_of, p_text, to_html
from symphony_vlm.evaluation.report_training import expert_graphs, expert_load, loss_curves
from symphony_vlm.evaluation.robustness import CLEAN, corrupted_cells

__all__ = ["build_sections", "verdicts"]

Json = Mapping[str, Any]

_PAPERS = (
    ("2510.16411", "Symphony routers"),
    ("1903.12261", "ImageNet-C: the corruptions and the mean corruption error"),
)


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
        key: "".join(to_html(table, heading=several) for table in tables if table.key == key)
        for key in ("clean", "groups", "robustness")
    }
    parts = [
        ("verdict", "Verdict", _verdict(robustness), ""),
        ("warnings", "Read this first", _warnings(warnings), "warnings"),
        ("clean", "Clean accuracy", by_key["clean"], ""),
        ("types", "Accuracy by question type", by_key["groups"], ""),
        ("severity", "Severity curves", severity_curves(data, robustness), ""),
        ("robustness", "Robustness", by_key["robustness"], ""),
        ("difference", "Router against baseline", _differences(tables), ""),
        ("loss", "Training loss", loss_curves(data), ""),
        ("load", "Expert load", expert_load(data), ""),
        ("graph", "Expert graph", expert_graphs(data), ""),
        ("routing", "Inside the routers", routing_section(data, tables), ""),
        ("samples", "Flipped samples", _samples(samples), ""),
        ("methods", "Provenance and methods", _provenance(data) + _methods(robustness), ""),
    ]
    return [(key, title, section(key, title, body, kind=kind)) for key, title, body, kind in parts if body]


def verdicts(robustness: Json) -> list[str]:
    """The result in one sentence per pair of models and task (one per model where there is no pair)."""
    if robustness["comparisons"]:
        return [_pair_verdict(comparison) for comparison in robustness["comparisons"]]
    return [_single_verdict(model) for model in robustness["models"]]


def _pair_verdict(comparison: Json) -> str:
    primary, clean = comparison["primary"], comparison["clean_difference"]
    better, other = comparison["model"], comparison["baseline"]
    beside = f"on clean images {better} minus {other} is {_interval(clean, signed=True)} points"
    if primary["value"] is None:
        if not _significant(clean):
            return f"On {comparison['task']}, no significant difference: {beside}; no robustness was measured."
        return f"On {comparison['task']}, {beside}; no robustness was measured."
    text = f"{_interval(primary, signed=True)} points, p {_p(primary['p'])}, {comparison['n_images']} images"
    if not _significant(primary):
        return (
            f"On {comparison['task']}, no significant difference in robustness between {better} and {other}: the "
            f"difference of their losses under corruption is {text}{_near_miss(primary)}; {beside}."
        )
    word = "less" if primary["value"] > 0 else "more"
    return (
        f"On {comparison['task']}, {better} loses {figure_of(abs(primary['value']))} points {word} than {other} under "
        f"corruption: the difference of the losses is {text}; {beside}."
    )


def _significant(number: Json) -> bool:
    """Both the interval and the test must say so: near the border they can disagree."""
    if number["ci_low"] is None or number["p"] is None:
        return False
    return bool((number["ci_low"] > 0 or number["ci_high"] < 0) and number["p"] < 0.05)


def _near_miss(number: Json) -> str:
    if number["ci_low"] is not None and (number["ci_low"] > 0 or number["ci_high"] < 0):
        return " (the interval leaves out 0, the test does not reject)"
    return " (the test rejects, the interval holds 0)" if number["p"] is not None and number["p"] < 0.05 else ""


def _single_verdict(model: Json) -> str:
    scale = 100.0 if (model["clean"]["value"] or 0) <= 1 else 1.0
    clean = (
        f"{_interval(model['clean'], scale=scale)}{' %' if scale == 100.0 else ''} {model['metric']} on clean images"
    )
    if model["retention"]["value"] is None:
        return f"On {model['task']}, {model['label']} reaches {clean}; retention: {model['retention']['reason']}."
    keeps = f"keeps {_interval(model['retention'])} % of it under corruption"
    return f"On {model['task']}, {model['label']} reaches {clean} and {keeps}."


def _interval(number: Json, *, scale: float = 100.0, signed: bool = False) -> str:
    main = figure_of(number["value"], scale=scale, signed=signed)
    if number["ci_low"] is None:
        return f"{main} (no interval: {number.get('reason', 'no item scores')})"
    low, high = (figure_of(number[key], scale=scale, signed=signed) for key in ("ci_low", "ci_high"))
    return f"{main} [{low}, {high}]"


def _p(p: float | None) -> str:
    return "not available" if p is None else p_text(p) if p < 0.001 else f"= {p_text(p)}"


def _verdict(robustness: Json) -> str:
    lines = "".join(f'<p class="verdict">{html.escape(text)}</p>' for text in verdicts(robustness))
    note = "Brackets are 95 % intervals over images. They say nothing about another training seed"
    several = "a difference between two single runs is a statement about these two runs."
    return (
        f'{lines}<p class="caption">{note}: {several}</p>'
        if robustness["comparisons"]
        else f'{lines}<p class="caption">{note}.</p>'
    )


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
            rows[block["label"], CLEAN[0], CLEAN[1]] = block["clean"]
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
    return "".join(to_html(table) for table in tables if table.key in ("summary", "did"))


def _samples(choices: Sequence[SampleChoice]) -> str:
    blocks = []
    for choice in choices:
        cards = "".join(_card(sample) for sample in choice.samples)
        count = f"{len(choice.samples)} of {choice.total}"
        blocks.append(f'<h3>{html.escape(choice.title)} ({count})</h3><div class="samples">{cards}</div>')
    note = "Chosen by the hash of item and corruption, not by hand; pairs of an item and a corrupted cell are counted."
    return f'{"".join(blocks)}<p class="caption">{note}</p>' if blocks else ""


def _card(sample: FlippedSample) -> str:
    def said(text: str, right: bool) -> str:
        mark, kind = ("✓ right", "right") if right else ("✗ wrong", "wrong")
        return f'<td>{html.escape(text)} <span class="mark {kind}">{mark}</span></td>'

    rows = "".join(
        f'<tr><th scope="row">{html.escape(label)}</th>{said(clean, ok)}{said(bad, bad_ok)}</tr>'
        for label, clean, bad, ok, bad_ok in sample.said
    )
    cell = f"{sample.cell[0].replace('_', ' ')}, severity {sample.cell[1]}"
    return (
        f'<article class="sample"><p class="sub">{html.escape(cell)} · {html.escape(sample.item_id)}</p>'
        f"<p>{html.escape(sample.question)}</p><p>Answer: <strong>{html.escape(sample.answer)}</strong></p>"
        '<table><thead><tr><th scope="col">model</th><th scope="col">clean</th>'
        f'<th scope="col">corrupted</th></tr></thead><tbody>'
        f"{rows}</tbody></table></article>"
    )


def _provenance(data: ReportData) -> str:
    columns = [(model.label, evaluation) for model in data.models for evaluation in model.evaluations]
    flat = [
        {
            **dict(_flatten(e.manifest)),
            **{f"results: {k}": v for k, v in _flatten(e.document.get("provenance") or {})},
            **({"recipe": str(e.training["recipe"])} if e.training and e.training.get("recipe") else {}),
        }
        for _, e in columns
    ]
    keys = list(dict.fromkeys(key for entry in flat for key in entry))
    if not keys:
        return ""
    head = "".join(f'<th scope="col">{html.escape(label)}</th>' for label, _ in columns)
    rows = []
    for key in keys:
        values = [entry.get(key, "–") for entry in flat]
        kind = ' class="differs"' if len(set(values)) > 1 and key not in ("model", "router") else ""
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        rows.append(f'<tr{kind}><th scope="row">{html.escape(key)}</th>{cells}</tr>')
    return (
        '<h3>Provenance</h3><div class="scroll" tabindex="0" role="region" aria-label="Provenance">'
        f'<table class="provenance"><thead><tr><th scope="col">field</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _flatten(value: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, part in value.items():
        name = f"{prefix}{key}"
        if isinstance(part, dict) and part:
            yield from _flatten(part, f"{name}.")
        else:
            yield name, part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)


def _methods(robustness: Json) -> str:
    used = robustness["parameters"]
    lines = [
        ("Intervals of scores", "As results.json gives them (per cell)."),
        (
            "Other intervals",
            f"{used['n_resamples']} bootstrap resamples of whole images (multinomial weights, seed {used['seed']}), "
            f"{100 * used['level']:.0f} % percentile interval; the same weights for every cell and model, so "
            "differences are paired. Ratios are resampled as ratios; no interval where the denominator's holds 0.",
        ),
        (
            "Tests",
            "Labels of the two models (or clean and corrupted) swapped for whole images: every pattern up to 20 images "
            f"that differ, else {used['n_sign_flips']} random ones with p = (1 + hits) / (1 + draws). Two-sided. Exact "
            "McNemar p-values of each cell are in results.json. Holm's correction is over all cells of a task.",
        ),
        ("Primary hypothesis", "Difference in differences of the unweighted mean over all common corrupted cells."),
        ("Significant", "Only where the interval leaves out 0 and p is below 0.05."),
        ("Retention", "Mean corrupted score / clean score. Above chance: both minus the best constant answer."),
        (
            "Mean corruption error",
            "100 x mean over corruptions of (sum over severities of 1 - score) / (the same of the named baseline). The "
            "relative one uses the rise over the clean error; not formed where the baseline's summed rise is below "
            f"{used['smallest_error_rise']}.",
        ),
        ("Severity AUC", "Trapezoids over severity from 0 (clean) to the highest, divided by that range."),
        ("Flips", "Right means a score of at least 0.5. Answer changes compare the parsed answers."),
        ("Items without a score", "Left out, or counted wrong where only that reproduces the score in results.json."),
    ]
    body = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in lines)
    links = ", ".join(f'<a href="https://arxiv.org/abs/{number}">{html.escape(name)}</a>' for number, name in _PAPERS)
    return f"<h3>Methods</h3><dl>{body}<dt>Papers</dt><dd>{links}</dd></dl>"
