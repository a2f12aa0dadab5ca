"""So many questions a cell that an evaluation ends in a given time.

The limit is chosen once, by measuring a few questions (`calibration`); another start takes it from the manifest. It is
whole pictures of the seeded order, the same for all cells and models. A share of the time is kept for statistics and
the report.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.calibration import Costs, Items, measure_costs
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.plan import EvaluationPlan
from symphony_vlm.evaluation.predictor import AnswersItems
from symphony_vlm.evaluation.processes import Processes
from symphony_vlm.evaluation.subset import first_pictures, pictures_in_order

__all__ = ["announce", "choose_limit", "expected_half_width", "half_widths", "recorded_budget", "settle_limit"]

RESERVED = 0.15
"""Share of the time for statistics, the report, and whatever is slower than what was measured."""
CALIBRATION = 0.05
"""Share of the time that measuring may take, beyond what it takes to see anything at all."""
Z95 = 1.959964


def recorded_budget(outputs: Sequence[Path]) -> dict[str, Any] | None:
    """The manifests' ``budget`` and ``limit`` of an earlier start; None if there was none.

    Raises:
        InputError: a folder holds an evaluation without a budget, or two hold different ones.
    """
    found: dict[Path, dict[str, Any]] = {}
    for output in outputs:
        path = output / "manifest.json"
        if path.is_file():
            manifest = json.loads(path.read_text())
            if not manifest.get("budget"):
                raise InputError(
                    "the folder holds an evaluation without a budget",
                    where=str(output),
                    remedy="Leave --budget out, or give another --output.",
                )
            found[output] = {"limit": manifest["limit"], "budget": manifest["budget"]}
    for output, other in found.items():
        first, known = next(iter(found.items()))
        if other != known:
            raise InputError(
                f"its budget chose other questions than that of {first}",
                where=str(output),
                remedy="Continue them one by one, or give another --output.",
            )
    return next(iter(found.values()), None)


def choose_limit(
    minutes: float,
    cells: Sequence[Cell],
    items: Items,
    costs: Costs,
    *,
    spent: float,
    seed: int,
    n_models: int,
    processes: int,
) -> tuple[int | None, dict[str, Any]]:
    """The largest limit with which the cells end in time.

    Args:
        minutes: for everything.
        cells: of the whole plan.
        items: of each task.
        costs: as measured.
        spent: seconds since the start.
        seed: of the order of pictures.
        n_models: asked together.
        processes: among which pictures are divided.

    Returns:
        Questions a cell, None for all, and for the manifest how they were chosen.

    Raises:
        InputError: not even one picture a cell fits.
    """
    usable = minutes * 60 * (1 - RESERVED) - spent
    ends = sorted({end for listed in items.values() for end in _ends(listed, seed)})

    def predicted(limit: int) -> float:
        return _seconds(limit, cells, items, costs, seed) * _largest_share(limit, items, seed, processes)

    low, high = 0, len(ends)  # so many of the limits fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if predicted(ends[middle - 1]) <= usable else (low, middle - 1)
    if low == 0:
        least = (predicted(ends[0]) + spent) / (1 - RESERVED) / 60
        raise InputError(
            f"{minutes:g} minutes are too few: one picture in each of {len(cells)} cells takes about {least:.2g}",
            where="--budget",
            remedy="Give more minutes, or fewer corruptions and severities.",
        )
    limit = None if low == len(ends) else ends[low - 1]
    chosen = {name: first_pictures(listed, seed, limit) for name, listed in items.items()}
    seconds = predicted(ends[low - 1])
    questions = {name: len(listed) for name, listed in chosen.items()}
    pictures = {name: len({item.image_key for item in listed}) for name, listed in chosen.items()}
    record = {
        "minutes": minutes,
        "questions_per_cell": questions,
        "pictures_per_cell": pictures,
        "expected_half_width": {name: list(expected_half_width(questions[name], pictures[name])) for name in chosen},
        "cells": len(cells),
        "models": n_models,
        "processes": processes,
        "predicted_seconds": round(seconds, 1),
        "seconds_before": round(spent, 1),
        "reserved_share": RESERVED,
        "seconds_per_question": {name: float(f"{value:.4g}") for name, value in costs.answering.items()},
        "seconds_per_picture": float(f"{sum(costs.opening.values()) / max(len(costs.opening), 1):.4g}"),
    }
    return limit, record


def expected_half_width(n_questions: int, n_pictures: int) -> tuple[float, float]:
    """Of the 95 % interval of an accuracy of one half, the widest.

    Returns:
        If the questions of a picture were independent, and if they were all right or all wrong together.
    """
    at_best, at_worst = (Z95 * math.sqrt(0.25 / max(n, 1)) for n in (n_questions, n_pictures))
    return round(at_best, 4), round(at_worst, 4)


def announce(budget: Mapping[str, Any], limit: int | None, console: Console, *, continued: bool) -> None:
    """Says what was chosen, now or by an earlier start."""
    for name, questions in budget["questions_per_cell"].items():
        best, worst = budget["expected_half_width"][name]
        pictures = budget["pictures_per_cell"][name]
        whole = "all " if limit is None else ""
        chosen = ", chosen before," if continued else ""
        console.print(
            f"budget of {budget['minutes']:g} minutes{chosen}: {whole}{questions} questions about {pictures} pictures "
            f"of {name} in each cell; 95 % intervals of at most +-{best:.3f} (+-{worst:.3f} if all questions of a "
            "picture stand or fall together)"
        )


def _ends(items: Sequence[EvaluationItem], seed: int) -> list[int]:
    """Limits that make a difference: the number of questions of the first picture, of the first two, ..."""
    total, ends = 0, []
    for group in pictures_in_order(items, seed):
        total += len(group)
        ends.append(total)
    return ends


def _largest_share(limit: int, items: Items, seed: int, size: int) -> float:
    """Of the questions, the share of the process that has most: the others wait for it."""
    chosen = [item for listed in items.values() for item in first_pictures(listed, seed, limit)]
    ranks = [Processes(rank=rank, size=size) for rank in range(size)]
    return max(sum(map(process.owns, chosen)) for process in ranks) / len(chosen)


def _seconds(limit: int, cells: Sequence[Cell], items: Items, costs: Costs, seed: int) -> float:
    """What all cells take in one process."""
    counts: dict[str, tuple[int, int]] = {}
    for name, listed in items.items():
        chosen = first_pictures(listed, seed, limit)
        counts[name] = len(chosen), len({item.image_key for item in chosen})
    total = 0.0
    for cell in cells:
        questions, pictures = counts[cell.task.name]
        total += questions * costs.answering[cell.task.name] + pictures * costs.opening[cell.file_name]
    return total


def half_widths(rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Of the 95 % intervals of each cell's first figure, as shares of its scale: the median and the largest."""
    first: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["ci_low"] is not None:
            width = (row["ci_high"] - row["ci_low"]) / 2 / row["scale"]
            first.setdefault((row["task"], row["corruption"], row["severity"]), width)
    if not first:
        return None
    return {"median": round(statistics.median(first.values()), 4), "largest": round(max(first.values()), 4)}


def settle_limit(
    plan: EvaluationPlan,
    recorded: Mapping[str, Any] | None,
    cells: Sequence[Cell],
    items: Items,
    predictors: Callable[[Cell], Sequence[AnswersItems]],
    *,
    started: float,
    n_models: int,
    processes: Processes,
    after_chunk: Callable[[], None],
    console: Console,
) -> EvaluationPlan:
    """The plan with a limit for its time: that of an earlier start, or one that measuring gives (first process).

    All processes measure, as they will work, at the same time; the first one chooses, and the others find its choice in
    the manifest.

    Args:
        plan: with ``budget_minutes``.
        recorded: see `recorded_budget`.
        cells: of the whole plan.
        items: of each task.
        predictors: all models, ready for a cell's task.
        started: when the evaluation began, of `time.monotonic`.
        n_models: how many models are asked.
        processes: who takes part.
        after_chunk: called when pictures are no longer needed.
        console: where it is said what was chosen.

    Raises:
        InputError: not even one picture a cell fits.
    """
    assert plan.budget_minutes is not None
    if recorded is not None:
        limit, record = recorded["limit"], dict(recorded["budget"])
    else:
        costs = measure_costs(
            cells,
            items,
            predictors,
            seconds=CALIBRATION * 60 * plan.budget_minutes,
            seed=plan.seed,
            batch_size=plan.batch_size,
            processes=processes,
            after_chunk=after_chunk,
        )
        if not processes.first:
            return plan
        limit, record = choose_limit(
            plan.budget_minutes,
            cells,
            items,
            costs,
            spent=time.monotonic() - started,
            seed=plan.seed,
            n_models=n_models,
            processes=processes.size,
        )
    if processes.first:
        announce(record, limit, console, continued=recorded is not None)
    return dataclasses.replace(plan, limit=limit, budget=record)
