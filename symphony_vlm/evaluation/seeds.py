"""Several training runs of one router: intervals over runs, beside those over images and never pooled with them.

An interval over images says how far the score of these very weights would move with other pictures. Whether another
training seed would give the same answer only other runs can tell; each run counts as one value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from symphony_vlm.evaluation.statistics import Interval, t_interval, welch_interval

__all__ = ["seed_summary"]

_FIGURES = ("clean", "mean_corrupted", "drop", "retention")

Json = Mapping[str, Any]

_UNLIKE: dict[str, object] = {
    "value": None,
    "ci_low": None,
    "ci_high": None,
    "reason": "the runs were evaluated in other cells or on other questions",
}


def seed_summary(models: Sequence[Json]) -> list[dict[str, object]]:
    """Student's interval over the runs of each router, and Welch's of the difference to the first router.

    Args:
        models: The ``"models"`` of the robustness block; the first router of a task is the baseline.

    Returns:
        For each task and router with at least two runs: ``task``, ``router``, ``runs`` (their labels), the figures
        ``clean, mean_corrupted, drop, retention`` and, beside another router with two runs or more, ``baseline`` and
        ``difference_in_differences``: the baseline's mean drop minus this router's, positive when this one loses less.
        A number is ``{"value", "ci_low", "ci_high", "runs"}``, null with a reason where a run lacks the figure or
        was evaluated in other cells or on another number of questions.
    """
    found: list[dict[str, object]] = []
    for task in dict.fromkeys(str(model["task"]) for model in models):
        groups: dict[str, list[Json]] = {}
        for model in models:
            if model["task"] == task:
                groups.setdefault(str(model["router"]), []).append(model)
        several = {router: runs for router, runs in groups.items() if len(runs) > 1}
        baseline = next(iter(groups), None)
        for router, runs in several.items():
            block: dict[str, object] = {"task": task, "router": router, "runs": [run["label"] for run in runs]}
            for figure in _FIGURES:
                block[figure] = _over_runs(_values(runs, figure)) if _alike(runs) else _UNLIKE
            if baseline in several and router != baseline:
                first = several[baseline]
                block["baseline"] = baseline
                block["difference_in_differences"] = (
                    _drop_difference(first, runs) if _alike([*first, *runs]) else _UNLIKE
                )
            found.append(block)
    return found


def _alike(runs: Sequence[Json]) -> bool:
    """Whether the runs' means are over the same cells and as many questions."""
    grids = {(run["n_items"], *sorted((c["corruption"], c["severity"]) for c in run["cells"])) for run in runs}
    return len(grids) == 1


def _values(runs: Sequence[Json], figure: str) -> list[float | None]:
    return [run[figure]["value"] for run in runs]


def _over_runs(values: Sequence[float | None]) -> dict[str, object]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return _missing(values)
    return {**_ends(t_interval(known)), "runs": known}


def _drop_difference(baseline: Sequence[Json], runs: Sequence[Json]) -> dict[str, object]:
    first, second = _values(baseline, "drop"), _values(runs, "drop")
    drops = [[value for value in group if value is not None] for group in (first, second)]
    if len(drops[0]) < len(first) or len(drops[1]) < len(second):
        return _missing([*first, *second])
    return _ends(welch_interval(drops[1], drops[0]))


def _ends(interval: Interval) -> dict[str, object]:
    return {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high}


def _missing(values: Sequence[float | None]) -> dict[str, object]:
    absent = sum(value is None for value in values)
    reason = f"{absent} of {len(values)} runs have no such figure"
    return {"value": None, "ci_low": None, "ci_high": None, "reason": reason}
