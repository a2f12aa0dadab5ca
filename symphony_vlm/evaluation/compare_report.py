"""Writes the comparison of two evaluations: the paired statistics, tables and one page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.comparable import check_comparable
from symphony_vlm.evaluation.comparison import robustness_summary
from symphony_vlm.evaluation.item_finder import ItemFinder
from symphony_vlm.evaluation.own_metric_loading import with_own_metrics
from symphony_vlm.evaluation.quantities import Resampling
from symphony_vlm.evaluation.report_data import Evaluation, ReportData, collect, load_evaluation
from symphony_vlm.evaluation.report_files import json_text, manifest_sha256, write_whole
from symphony_vlm.evaluation.report_page import page
from symphony_vlm.evaluation.report_samples import choose_samples
from symphony_vlm.evaluation.report_sections import build_sections
from symphony_vlm.evaluation.report_tables import build_tables, cells_csv, to_latex, to_markdown
from symphony_vlm.evaluation.report_verdict import verdicts
from symphony_vlm.evaluation.report_warnings import find_warnings

__all__ = ["WrittenComparison", "write_comparison"]

_ABOUT_TRAINING = frozenset({"loss", "load", "graph"})
"""Sections of the report that say nothing about a difference of answers."""


@dataclass(frozen=True, kw_only=True)
class WrittenComparison:
    """Where the comparison is and what it found."""

    json: Path
    html: Path
    verdicts: tuple[str, ...]
    primary: Mapping[str, Any]
    """Task -> the primary difference in differences: ``name, value, ci_low, ci_high, p, log_scale``."""


def write_comparison(
    first: Path,
    second: Path,
    output: Path,
    *,
    resampling: Resampling | None = None,
    finder: ItemFinder | None = None,
) -> WrittenComparison:
    """Writes ``comparison.json``, ``comparison.html``, ``cells.csv``, ``tables.md`` and ``tables.tex``.

    Equal inputs give equal bytes; inputs are never changed.

    Args:
        first: Evaluation folder of A, the baseline.
        second: Evaluation folder of B, on the same items.
        output: Folder to write to; made if missing.
        resampling: Seed, numbers of draws and kind of intervals and tests.
        finder: Finds the questions and their pictures; default: where the evaluations had their data.

    Raises:
        InputError: A folder cannot be read, the two are not comparable (see `check_comparable`), or ``output`` is a
            file or one of the two.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError("the output is a file, expected a folder", where=str(output))
    pair = [load_evaluation(Path(folder)) for folder in (first, second)]
    for evaluation in pair:
        if evaluation.folder.resolve() == output.resolve():
            raise InputError("the output is one of the inputs", where=str(output), remedy="Give another --output.")
    if pair[0].folder.resolve() == pair[1].folder.resolve():
        raise InputError("an evaluation compared with itself", where=str(pair[1].folder))
    tasks = check_comparable(pair[0], pair[1])
    data = collect([_only(evaluation, tasks) for evaluation in _told_apart(pair)])
    with finder or ItemFinder() as found:
        data = with_own_metrics(data, found)
        samples = choose_samples(data, finder=found)
    robustness = robustness_summary(data.scores, resampling or Resampling())
    warnings = find_warnings(data, robustness, training=False)
    tables = build_tables(data, robustness)
    parts = build_sections(data, robustness, tables, samples, warnings)
    sections = [part for part in parts if part[0] not in _ABOUT_TRAINING]
    labels = [model.label for model in data.models]
    html = page(
        title=f"{labels[1]} against {labels[0]}: {', '.join(tasks)}",
        subtitle=" · ".join(f"{model.label}: {model.model}" for model in data.models),
        sections=[(key, title) for key, title, _ in sections],
        body="".join(body for _, _, body in sections),
        made_by="symphony-vlm compare",
        numbers_in="comparison.json and cells.csv",
    )
    output.mkdir(parents=True, exist_ok=True)
    written = WrittenComparison(
        json=output / "comparison.json",
        html=output / "comparison.html",
        verdicts=tuple(verdicts(robustness)),
        primary={comparison["task"]: comparison["primary"] for comparison in _list(robustness["comparisons"])},
    )
    write_whole(written.json, json_text(_document(data, robustness, warnings, written.verdicts)))
    write_whole(output / "cells.csv", cells_csv(data, robustness))
    write_whole(output / "tables.md", to_markdown(tables))
    write_whole(output / "tables.tex", to_latex(tables))
    write_whole(written.html, html)
    return written


def _told_apart(pair: Sequence[Evaluation]) -> list[Evaluation]:
    """Two evaluations of one model (before and after, in other precision) get names of their own."""
    owners = [{(row["model"], row["router"]) for row in evaluation.document["results"]} for evaluation in pair]
    if owners[0] != owners[1]:
        return list(pair)
    return [_renamed(evaluation, letter) for evaluation, letter in zip(pair, "AB", strict=True)]


def _renamed(evaluation: Evaluation, letter: str) -> Evaluation:
    rows = [{**row, "model": f"{row['model']}/{letter}"} for row in evaluation.document["results"]]
    return replace(evaluation, document={**evaluation.document, "results": rows})


def _only(evaluation: Evaluation, tasks: Sequence[str]) -> Evaluation:
    rows = [row for row in evaluation.document["results"] if row["task"] in tasks]
    return replace(evaluation, document={**evaluation.document, "results": rows})


def _document(
    data: ReportData, robustness: Mapping[str, Any], warnings: Sequence[str], sentences: Sequence[str]
) -> dict[str, Any]:
    sides = {
        letter: {
            "label": model.label,
            "model": model.model,
            "router": model.router,
            "manifest_sha256": manifest_sha256(model.evaluations[0]),
            "provenance": model.evaluations[0].document.get("provenance"),
        }
        for letter, model in zip("ab", data.models, strict=True)
    }
    return {**sides, "verdicts": list(sentences), **robustness, "results": list(data.rows), "warnings": list(warnings)}


def _list(value: object) -> list[dict[str, Any]]:
    assert isinstance(value, list)
    return value
