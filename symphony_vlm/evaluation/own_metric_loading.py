"""Which evaluations need their items whole, and loading them."""

from __future__ import annotations

from dataclasses import replace

from symphony_vlm.evaluation.cell_records import Cell
from symphony_vlm.evaluation.item import Outcome
from symphony_vlm.evaluation.item_finder import ItemFinder
from symphony_vlm.evaluation.own_metric import OwnMetric
from symphony_vlm.evaluation.report_data import ModelInfo, ReportData, read_lines
from symphony_vlm.evaluation.robustness import AGREEMENT, ModelScores, is_mean_of_items
from symphony_vlm.evaluation.task import get_task

__all__ = ["with_own_metrics"]


def with_own_metrics(data: ReportData, finder: ItemFinder) -> ReportData:
    """The same, where a task's headline figure is no mean of item scores with what it takes to resample it.

    Models whose items cannot be found, or whose figures do not come out as results.json has them, stay as they are:
    the report then says that they have no interval.
    """
    owners = {model.label: model for model in data.models}
    scores = tuple(_with_own_metric(one, owners[one.label], finder) for one in data.scores)
    return replace(data, scores=scores)


def _with_own_metric(scores: ModelScores, model: ModelInfo, finder: ItemFinder) -> ModelScores:
    known = [cell for cell in scores.values if cell in scores.records and scores.values[cell] is not None]
    if not known or all(is_mean_of_items(scores, cell) for cell in known) or set(known) != set(scores.values):
        return scores
    outcomes = {cell: found for cell in known if (found := _outcomes(scores, model, cell, finder))}
    if set(outcomes) != set(known):
        return scores
    task = get_task(scores.task.split("/")[0])
    if scores.metric not in {metric.name for metric in task.metrics(list(next(iter(outcomes.values())).values()))}:
        return scores
    own = OwnMetric(name=scores.metric, metrics=task.metrics, outcomes=outcomes)
    for cell in known:
        again, told = own.value(cell), scores.values[cell]
        if again is None or told is None or abs(again - told) > AGREEMENT:
            return scores
    return replace(scores, own=own)


def _outcomes(scores: ModelScores, model: ModelInfo, cell: Cell, finder: ItemFinder) -> dict[str, Outcome]:
    """Outcomes of a cell by item; empty where an item is not found."""
    name = scores.task.split("/")[0]
    asked = set(scores.records[cell].item_ids)
    for evaluation in model.evaluations:
        path = evaluation.files.get((name, cell))
        items = finder.items(evaluation, name) if path is not None else "no file"
        if path is None or isinstance(items, str):
            continue
        task = get_task(name)
        found: dict[str, Outcome] = {}
        for record in read_lines(path):
            item, text = items.get(str(record["item_id"])), record.get("prediction")
            if item is None or item.id not in asked:
                return {}
            if text is not None:
                found[item.id] = Outcome(item=item, prediction=str(text), scored=task.score(str(text), item))
        return found
    return {}
