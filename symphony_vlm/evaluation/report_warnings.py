"""What a reader must know before believing a number of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from symphony_vlm.evaluation.report_data import Evaluation, ModelInfo, ReportData
from symphony_vlm.evaluation.robustness import CLEAN, ModelScores, score_matrix

__all__ = ["find_warnings"]


def find_warnings(data: ReportData, robustness: Mapping[str, Any], *, training: bool = True) -> list[str]:
    """One sentence for each thing that limits the results; an empty list if there is none.

    Args:
        data: What the page shows.
        robustness: What was computed from it.
        training: Whether the page shows the training, and so misses the record of one.
    """
    found = [
        *_counted(data),
        *(text for model in data.models for text in _folder(model)),
        *(text for model in data.models for text in _training(model) if training),
        *(text for scores in data.scores for text in _scores(scores)),
        *_baselines(data, robustness),
        *_pairs(data, robustness),
    ]
    return list(dict.fromkeys(found))


def _counted(data: ReportData) -> Iterator[str]:
    for model in data.models:
        for scores in (s for s in data.scores if s.label == model.label):
            rows = [
                row
                for row in data.rows
                if (row["model"], row["router"] or "none") == (model.model, model.router)
                and scores.task in (row["task"], f"{row['task']}/{row.get('split')}")
                and row["metric"] == scores.metric
            ]
            for field, noun in (
                ("n_errors", "ended in an error and have no answer"),
                ("n_unparsed", "could not be parsed"),
            ):
                count, total = sum(row.get(field) or 0 for row in rows), sum(row.get("n_items") or 0 for row in rows)
                if count:
                    cells = sum(bool(row.get(field)) for row in rows)
                    share = f" ({100 * count / total:.2g} %)" if total else ""
                    where = "1 cell" if cells == 1 else f"{cells} cells"
                    yield f"{model.label}, {scores.task}: {count} of {total} answers{share} in {where} {noun}."
            sizes = {row.get("n_items") for row in rows}
            if len(sizes) > 1:
                low, high = min(map(_int, sizes)), max(map(_int, sizes))
                yield (
                    f"{model.label}, {scores.task}: cells differ in their number of items ({low} to {high}). "
                    "Retention, flips and differences use the items that every cell holds."
                )


def _int(value: Any) -> int:
    return int(value or 0)


def _folder(model: ModelInfo) -> Iterator[str]:
    for evaluation in model.evaluations:
        for field, what in (("limit", "every cell"), ("corrupted_limit", "the corrupted cells")):
            limit = evaluation.manifest.get(field)
            if limit:
                yield f"{model.label}: {what} limited to about {limit} questions; not the score of the whole benchmark."
        if evaluation.manifest.get("batch_invariant") is False:
            yield f"{model.label}: scores depend on the batch size (batch_check in results.json has the questions)."
        if not evaluation.manifest:
            yield f"{model.label}: no manifest.json, so what produced these results is not known."
        if not evaluation.records:
            yield f"{model.label}: no predictions, so figures derived from the scores have no interval."


def _training(model: ModelInfo) -> Iterator[str]:
    if model.training is None:
        yield f"{model.label}: no training.json, so its training curves and routing are not shown."


def _scores(scores: ModelScores) -> Iterator[str]:
    name = f"{scores.label}, {scores.task}"
    _, _, _, unusable = score_matrix(scores.records, list(scores.values), scores.values)
    missing = [cell for cell in scores.values if scores.values[cell] is None]
    if missing:
        yield f"{name}: {len(missing)} cells have no score because too many items failed."
    odd = [cell for cell, why in unusable.items() if "mean of the item" in why and cell not in missing]
    if odd and scores.own is None:
        yield (
            f"{name}: in {len(odd)} cells the score is not the mean of the item scores; they have no interval here, "
            "because the benchmark's data was not found or gives other figures (see --data)."
        )
    if CLEAN not in scores.values:
        yield f"{name}: the clean images were not evaluated, so there is no retention."
    grid = {(c, s) for c, _ in scores.values for _, s in scores.values if c != "none" and s != 0}
    gaps = grid - set(scores.values)
    if gaps:
        yield f"{name}: {len(gaps)} cells of the grid of corruptions and severities were not evaluated."
    pool = [records for records in scores.records.values() if not np.isnan(records.scores).all()]
    if pool and len(set(pool[0].images)) < 30:
        yield f"{name}: only {len(set(pool[0].images))} images; intervals from so few are rough and usually too narrow."


def _baselines(data: ReportData, robustness: Mapping[str, Any]) -> Iterator[str]:
    for model in robustness["models"]:
        blind = [
            b
            for b in data.baselines
            if b.task == model["task"].split("/")[0]
            and b.metric == model["metric"]
            and b.label in (model["label"], "every model")
            and b.value is not None
        ]
        best = max(blind, key=lambda b: b.value or 0.0, default=None)
        clean = model["clean"]
        low = clean["ci_low"] if clean["ci_low"] is not None else clean["value"]
        if best is not None and best.value is not None and low is not None and low <= best.value:
            yield (
                f"{model['label']}, {model['task']}: the clean score is not clearly above the baseline '{best.name}', "
                "which does not look at the picture. Robustness to corrupted pictures then means little."
            )


def _pairs(data: ReportData, robustness: Mapping[str, Any]) -> Iterator[str]:
    for comparison in robustness["comparisons"]:
        pair = f"{comparison['model']} and {comparison['baseline']}, {comparison['task']}"
        if comparison["n_different_pixels"]:
            count = comparison["n_different_pixels"]
            yield f"{pair}: {count} items were shown with different pixels; they are not paired."
        own = [m["n_items"] for m in robustness["models"] if m["task"] == comparison["task"] and m["n_items"]]
        if comparison["n_items"] == 0:
            yield f"{pair}: no items in common; differences have no interval."
        elif comparison["n_items"] < max(own, default=0):
            yield f"{pair}: only {comparison['n_items']} of up to {max(own)} items in common."
    for field in ("seed", "git_commit", "versions"):
        values = {repr({**_provenance(e), **e.manifest}.get(field)) for m in data.models for e in m.evaluations}
        if len(values) > 1:
            yield f"The evaluations differ in '{field}' (see provenance)."


def _provenance(evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.document.get("provenance")
    return found if isinstance(found, dict) else {}
