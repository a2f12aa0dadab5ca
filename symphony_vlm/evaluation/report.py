"""Writes the report of one or more evaluations: merged results, tables and one page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.comparison import robustness_summary
from symphony_vlm.evaluation.item_finder import ItemFinder
from symphony_vlm.evaluation.own_metric_loading import with_own_metrics
from symphony_vlm.evaluation.report_attacks import attack_figures, attack_tables, attack_warnings
from symphony_vlm.evaluation.report_data import Evaluation, ReportData, collect, load_evaluation
from symphony_vlm.evaluation.report_files import json_text, manifest_sha256, write_whole
from symphony_vlm.evaluation.report_page import page
from symphony_vlm.evaluation.report_routing import merged_blocks, routing_tables
from symphony_vlm.evaluation.report_samples import choose_samples
from symphony_vlm.evaluation.report_sections import build_sections
from symphony_vlm.evaluation.report_tables import build_tables, cells_csv, to_latex, to_markdown
from symphony_vlm.evaluation.report_warnings import find_warnings
from symphony_vlm.evaluation.robustness import Resampling

__all__ = ["write_report"]


def write_report(
    folders: Sequence[Path],
    output: Path,
    *,
    baseline: str | None = None,
    resampling: Resampling | None = None,
    finder: ItemFinder | None = None,
) -> Path:
    """Writes ``report.html``, ``results.json``, ``cells.csv``, ``tables.md`` and ``tables.tex``.

    Equal inputs give equal bytes. Inputs are never changed, with one exception: where ``output`` is the only input
    folder, its results.json gains the ``"robustness"`` block. Where ``output`` is one of several input folders, the
    merged results are written to ``report.results.json`` instead.

    Args:
        folders: Evaluation folders; the first model found is the baseline of the others.
        output: Folder to write to; made if missing.
        baseline: Router (or label) of another model to compare with.
        resampling: Seed, numbers of draws and kind of intervals and tests.
        finder: Finds the questions and their pictures; default: where the evaluations had their data.

    Returns:
        The path of report.html.

    Raises:
        InputError: A folder is missing, a file in it does not hold what it should, or there is no such baseline.
    """
    if not folders:
        raise InputError("no evaluation folder given", remedy="Name at least one folder written by 'symphony-vlm eval'")
    evaluations = [load_evaluation(folder) for folder in _unique([Path(folder) for folder in folders])]
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError("the output is a file, expected a folder", where=str(output))
    data = collect(_baseline_first(evaluations, baseline))
    resampling = resampling or Resampling()
    with finder or ItemFinder() as found:
        data = with_own_metrics(data, found)
        samples = choose_samples(data, finder=found)
    robustness = robustness_summary(data.scores, resampling)
    warnings = [*find_warnings(data, robustness), *attack_warnings(data)]
    tables = [*build_tables(data, robustness), *routing_tables(data)]
    if data.attacked_rows:
        figures = attack_figures(data, resampling)
        robustness = {**robustness, "attacks": figures}
        tables += attack_tables(data, figures)
    sections = build_sections(data, robustness, tables, samples, warnings)
    tasks = ", ".join(dict.fromkeys(scores.task for scores in data.scores))
    html = page(
        title=f"Evaluation: {tasks}",
        subtitle=" · ".join(f"{model.label}: {model.model}" for model in data.models),
        sections=[(key, title) for key, title, _ in sections],
        body="".join(body for _, _, body in sections),
    )
    output.mkdir(parents=True, exist_ok=True)
    merged = _merged(evaluations, data, robustness, warnings)
    write_whole(output / _results_name(evaluations, output), json_text(merged))
    write_whole(output / "cells.csv", cells_csv(data, robustness))
    write_whole(output / "tables.md", to_markdown(tables))
    write_whole(output / "tables.tex", to_latex(tables))
    write_whole(output / "report.html", html)
    return output / "report.html"


def _unique(folders: Sequence[Path]) -> list[Path]:
    return list({folder.resolve(): folder for folder in folders}.values())


def _baseline_first(evaluations: Sequence[Evaluation], baseline: str | None) -> list[Evaluation]:
    if baseline is None:
        return list(evaluations)
    labels = {model.label: model for model in collect(evaluations).models}
    routers = {model.router: model for model in labels.values()}
    chosen = labels.get(baseline) or routers.get(baseline)
    if chosen is None:
        raise InputError(
            f"no model with router {baseline!r}", where="baseline", remedy=f"There are: {', '.join(labels)}"
        )
    return sorted(evaluations, key=lambda evaluation: evaluation not in chosen.evaluations)


def _results_name(evaluations: Sequence[Evaluation], output: Path) -> str:
    inputs = {evaluation.folder.resolve() for evaluation in evaluations}
    return "report.results.json" if len(inputs) > 1 and output.resolve() in inputs else "results.json"


def _merged(
    evaluations: Sequence[Evaluation], data: ReportData, robustness: Mapping[str, Any], warnings: Sequence[str]
) -> dict[str, Any]:
    """One evaluation keeps its own fields; several share what can be shared and list the rest."""
    derived = {**robustness, "warnings": list(warnings)}
    rows = [*data.rows, *data.attacked_rows]
    if len(evaluations) == 1:
        document = evaluations[0].document
        old = document.get("robustness")
        # Another program's figures (routing drift) stay beside ours.
        derived = {**(old if isinstance(old, dict) else {}), **derived}
        return {**document, "results": rows, "robustness": derived}
    derived["routing_drift"] = merged_blocks(data)
    provenance = []
    for model in data.models:
        for evaluation in model.evaluations:
            own = evaluation.document.get("provenance")
            provenance.append(
                {
                    "model": model.model,
                    "router": model.router,
                    "manifest_sha256": manifest_sha256(evaluation),
                    **(own if isinstance(own, dict) else {}),
                }
            )
    baselines = [
        {"model": model.model, "router": model.router, **row}
        for model in data.models
        for evaluation in model.evaluations
        for row in evaluation.document.get("baselines") or []
    ]
    return {
        "results": rows,
        "robustness": derived,
        "provenance": {"evaluations": provenance},
        "baselines": baselines,
    }
