"""The report's end: where the results come from, side by side, and how every number was computed."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

from symphony_vlm.evaluation.report_data import ReportData

__all__ = ["methods", "provenance_table"]

Json = Mapping[str, Any]

_PAPERS = (
    ("2510.16411", "Symphony routers"),
    ("1903.12261", "ImageNet-C: the corruptions and the mean corruption error"),
)


def provenance_table(data: ReportData) -> str:
    """Manifest and provenance of every evaluation, a column each; rows that differ are marked."""
    columns = [(model.label, evaluation) for model in data.models for evaluation in model.evaluations]
    flat = [
        {
            **dict(_flatten(e.manifest)),
            # Sorted: a report written into its own folder sorts the keys of results.json.
            **{f"results: {k}": v for k, v in sorted(_flatten(e.document.get("provenance") or {}))},
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


def methods(robustness: Json) -> str:
    """Definitions and parameters."""
    used = robustness["parameters"]
    lines = [
        ("Intervals of scores", "As results.json gives them (per cell)."),
        (
            "Other intervals",
            f"{used['n_resamples']} bootstrap resamples of whole images (multinomial weights, seed {used['seed']}), "
            f"{100 * used['level']:.0f} % interval ({used['interval']}); the same weights for every cell and model, so "
            "differences are paired. Ratios are resampled as ratios; no interval where the denominator's holds 0.",
        ),
        (
            "Tests",
            "Labels of the two models (or clean and corrupted) swapped for whole images: every pattern up to 20 images "
            f"that differ, else {used['n_sign_flips']} random ones with p = (1 + hits) / (1 + draws). Two-sided. "
            "Holm's correction is over all cells of a task. Exact McNemar tests of each cell, which take the questions "
            "of an image for independent, stand in the JSON file and in cells.csv.",
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
        (
            "Format",
            "Unparsed: the official rule made nothing of the answer. Format loss: drop by the official rule minus drop "
            "by the lenient one.",
        ),
        (
            "Training runs",
            "Student's t over the runs of a router, each run one value; never pooled with intervals over images.",
        ),
        ("Items without a score", "Left out, or counted wrong where only that reproduces the score in results.json."),
    ]
    body = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in lines)
    links = ", ".join(f'<a href="https://arxiv.org/abs/{number}">{html.escape(name)}</a>' for number, name in _PAPERS)
    return f"<h3>Methods</h3><dl>{body}<dt>Papers</dt><dd>{links}</dd></dl>"
