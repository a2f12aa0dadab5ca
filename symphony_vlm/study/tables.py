"""The figures of a study's results.json, from what its cells scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from symphony_vlm.evaluation.statistics import Interval, holm
from symphony_vlm.study.routing_facts import final_routing
from symphony_vlm.study.scores import ArmScores
from symphony_vlm.study.selection import Chosen
from symphony_vlm.study.setting import Part, Setting
from symphony_vlm.study.statistics import Comparison, compare_arms, mean_over_seeds, ratio_over_seeds

__all__ = [
    "Pair", "arm_rows", "comparison_rows", "pairs_of_arms", "pairs_of_choices", "pairs_of_controls", "scores_of",
]  # fmt: skip

Scores = Mapping[str, Mapping[str, ArmScores]]
"""By data set and arm."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An arm and what it is compared with; the names are what the tables say."""

    arm: str
    baseline: str
    name: str
    baseline_name: str


def scores_of(setting: Setting, part: Part, arms: Sequence[str]) -> dict[str, dict[str, ArmScores]]:
    """What is done on a part of the data, by data set and arm.

    Raises:
        InputError: cells of one arm were asked different questions.
    """
    found = {
        data: {arm: ArmScores(cells, f"{data}/{arm}, {part}") for arm, cells in setting.cells(part, data, arms).items()}
        for data in setting.data()
    }
    return {data: arms_of for data, arms_of in found.items() if arms_of}


def pairs_of_arms(setting: Setting) -> list[Pair]:
    """Every arm against its baseline."""
    return [
        Pair(arm=name, baseline=arm.baseline, name=name, baseline_name=arm.baseline)
        for name, arm in setting.study.arms.items()
        if arm.baseline is not None
    ]


def pairs_of_controls(setting: Setting) -> list[Pair]:
    """Every arm against the negative controls that it names."""
    return [
        Pair(arm=name, baseline=control, name=name, baseline_name=control)
        for name, arm in setting.study.arms.items()
        for control in arm.controls
    ]


def pairs_of_choices(chosen: Sequence[Chosen]) -> list[Pair]:
    """What was chosen against its baseline, which may be a choice too."""
    arms = {choice.name: choice.arm for choice in chosen}
    return [
        Pair(
            arm=choice.arm,
            baseline=arms.get(choice.baseline, choice.baseline),
            name=choice.name,
            baseline_name=choice.baseline,
        )
        for choice in chosen
        if choice.baseline is not None
    ]


def arm_rows(setting: Setting, part: Part, scores: Scores) -> list[dict[str, Any]]:
    """One row an arm and data set: means with intervals, and what the routers did in training."""
    return [_arm_row(setting, part, data, name, found) for data, arms in scores.items() for name, found in arms.items()]


def comparison_rows(setting: Setting, part: Part, pairs: Sequence[Pair], scores: Scores) -> list[dict[str, Any]]:
    """Each condition, and whether the corruption or attack costs an arm more or less; Holm over a data set's rows."""
    rows: list[dict[str, Any]] = []
    for data, arms in scores.items():
        own = [
            row
            for pair in pairs
            if pair.arm in arms and pair.baseline in arms
            for row in _compared(setting, pair, arms[pair.arm], arms[pair.baseline])
        ]
        tested = [row for row in own if row["p_seeds"] is not None]
        for row, adjusted in zip(tested, holm([row["p_seeds"] for row in tested]), strict=True):
            row["p_holm"] = adjusted
        rows += [{"part": part, "data": data, **row} for row in own]
    return rows


def _arm_row(setting: Setting, part: Part, data: str, name: str, scores: ArmScores) -> dict[str, Any]:
    shown = setting.conditions
    values = {condition: _value(setting, scores, condition) for condition in shown}
    others = {c: _mean(setting, scores, c) for c in scores.conditions if "/" in c}
    row: dict[str, Any] = {
        "part": part,
        "data": data,
        "arm": name,
        "control": setting.study.arms[name].control,
        "seeds": scores.seeds,
        "values": values,
        "cells": others,
        "routing": final_routing([cell.run for cell in scores.cells]),
        "predictions_sha256": scores.predictions_sha256(),
    }
    if setting.unit.higher_is_better:
        row["retention"] = {c: _retention(setting, scores, c) for c in shown[1:]}
    seconds = [cell.seconds for cell in scores.cells if cell.seconds is not None]
    return row | {"seconds": mean(seconds) if seconds else None}


def _value(setting: Setting, scores: ArmScores, condition: str) -> dict[str, Any]:
    sums, weights = scores.sums(condition), scores.weights(condition)
    shown = _as_shown(setting, mean_over_seeds(sums, weights))
    per_seed = [_transformed(setting, float(row.sum() / weights.sum())) for row in sums]
    return shown | {"per_seed": per_seed}


def _mean(setting: Setting, scores: ArmScores, condition: str) -> dict[str, float]:
    return _as_shown(setting, mean_over_seeds(scores.sums(condition), scores.weights(condition)))


def _as_shown(setting: Setting, found: Interval) -> dict[str, float]:
    """Perplexities are means of nats, exponentiated."""
    ends = {"value": found.value, "ci_low": found.low, "ci_high": found.high}
    return {name: _transformed(setting, value) for name, value in ends.items()}


def _transformed(setting: Setting, value: float) -> float:
    return value if setting.unit.higher_is_better else math.exp(value)


def _retention(setting: Setting, scores: ArmScores, condition: str) -> dict[str, float] | None:
    clean = setting.clean_of(condition)
    found = ratio_over_seeds(
        scores.sums(condition), scores.weights(condition), scores.sums(clean), scores.weights(clean)
    )
    return None if found is None else {"value": found.value, "ci_low": found.low, "ci_high": found.high}


def _compared(setting: Setting, pair: Pair, arm: ArmScores, baseline: ArmScores) -> list[dict[str, Any]]:
    seeds = [seed for seed in arm.seeds if seed in baseline.seeds]
    if not seeds:
        return []
    rows = []
    for condition in setting.conditions:
        first, second = baseline.sums(condition, seeds), arm.sums(condition, seeds)
        weights = arm.weights(condition)
        rows.append(_row(setting, pair, condition, seeds, compare_arms(first, second, weights)))
        if condition != setting.conditions[0]:
            clean = setting.clean_of(condition)
            found = compare_arms(first - baseline.sums(clean, seeds), second - arm.sums(clean, seeds), weights)
            rows.append(_row(setting, pair, f"change by {condition}", seeds, found))
    return rows


def _row(setting: Setting, pair: Pair, condition: str, seeds: Sequence[int], found: Comparison) -> dict[str, Any]:
    return {
        "arm": pair.name,
        "baseline": pair.baseline_name,
        "control": setting.study.arms[pair.arm].control,
        "condition": condition,
        "n_seeds": len(seeds),
        "difference": asdict(found.interval),
        "p_seeds": found.p_seeds,
        "p_holm": None,
        "p_data": found.p_data,
    }
