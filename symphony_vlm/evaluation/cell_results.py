"""The rows of ``results.json`` that one cell gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from symphony_vlm.evaluation.attacks.attack import Attack
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.metrics import Metric, metric_intervals
from symphony_vlm.evaluation.plan import EvaluationPlan
from symphony_vlm.evaluation.records import Record
from symphony_vlm.evaluation.statistics import Interval

__all__ = ["cell_results"]


def cell_results(
    plan: EvaluationPlan,
    cell: Cell,
    router: str,
    items: Sequence[EvaluationItem],
    records: Sequence[Record],
    attack: Attack | None = None,
) -> list[dict[str, Any]]:
    """The task's figures, headline first; those of groups (``accuracy/colour``) for the clean cell only.

    Items that failed are counted and in no figure; if they are more than ``plan.max_errors``, there is none at all.

    Args:
        plan: what was evaluated.
        cell: which part of it.
        router: the model's, or ``dense``.
        items: of the cell.
        records: one for each item.
        attack: the cell's; its own figures follow the task's.
    """
    if attack is not None:
        items = [
            item if record["prediction"] is None else attack.asked(item, record)
            for item, record in zip(items, records, strict=True)
        ]
    outcomes = [
        Outcome(item=item, prediction=record["prediction"], scored=cell.task.score(record["prediction"], item))
        for item, record in zip(items, records, strict=True)
        if record["prediction"] is not None
    ]
    # Records of items that failed still count as items, and groups are those of all items.
    everything = [
        Outcome(item=item, prediction=None, scored=Scored(score=0.0, parsed="", status="error")) for item in items
    ]
    metrics = [m for m in cell.task.metrics(outcomes or everything) if cell.is_clean or "/" not in m.name]
    if attack is not None:
        metrics += attack.metrics({record["item_id"]: record for record in records})
    reason = _no_score(len(items) - len(outcomes), len(items), plan.max_errors)
    intervals = metric_intervals(metrics, outcomes, seed=plan.seed) if outcomes and reason is None else {}
    by_id = {record["item_id"]: record for record in records}
    return [
        _row(
            plan,
            cell,
            router,
            metric,
            intervals.get(metric.name),
            [by_id[outcome.item.id] for outcome in metric.members(everything)],
        )
        | ({} if reason is None else {"no_score": reason})
        for metric in metrics
    ]


def _no_score(n_errors: int, n_items: int, max_errors: float) -> str | None:
    if n_errors <= max_errors * n_items:
        return None
    return f"{n_errors} of {n_items} items failed, more than max_errors ({max_errors:g}) allows"


def _row(
    plan: EvaluationPlan,
    cell: Cell,
    router: str,
    metric: Metric,
    interval: Interval | None,
    records: Sequence[Record],
) -> dict[str, Any]:
    return {
        "model": plan.model,
        "router": router,
        "task": cell.task.name,
        "split": cell.task.split,
        "corruption": cell.corruption,
        "severity": cell.severity,
        "attack": cell.attack,
        "metric": metric.name,
        "value": interval.value if interval else None,
        "higher_is_better": metric.higher_is_better,
        "scale": metric.scale,
        "ci_low": interval.low if interval else None,
        "ci_high": interval.high if interval else None,
        "n_items": len(records),
        "n_images": len({record["image_key"] for record in records}),
        "n_errors": sum(record["error"] is not None for record in records),
        "n_unparsed": sum(record["parse_status"] in ("unparsed", "empty", "ambiguous") for record in records),
    }
