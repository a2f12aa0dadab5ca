"""Choosing settings by the development data, so that the test data is asked about one arm of many, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from symphony_vlm.errors import InputError
from symphony_vlm.study.configuration import Choice, Select
from symphony_vlm.study.scores import ArmScores
from symphony_vlm.study.setting import Setting

__all__ = ["Chosen", "arms_to_test", "choose"]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What one choice came to."""

    name: str
    arm: str
    baseline: str | None
    tried: Mapping[str, float]
    """Mean over seeds of the development score, by arm."""


def choose(setting: Setting, select: Select, scores: Mapping[str, ArmScores]) -> list[Chosen]:
    """Each choice's best arm by its mean over seeds of the development score; of equals the first.

    Args:
        setting: what is better, and the seeds that every arm must have.
        select: the choices.
        scores: on the development data, by arm.

    Raises:
        InputError: a cell is missing, or there is no such condition.
    """
    if select.by not in setting.conditions:
        raise InputError(
            f"{select.by!r} is not one of {', '.join(setting.conditions)}", where="select.by", remedy="Name one."
        )
    return [_chosen(setting, select.by, name, choice, scores) for name, choice in select.choices.items()]


def _chosen(setting: Setting, by: str, name: str, choice: Choice, scores: Mapping[str, ArmScores]) -> Chosen:
    tried = {}
    for arm in choice.among:
        if arm not in scores or scores[arm].seeds != setting.study.seeds:
            raise InputError(
                f"{arm!r} has not finished every seed, and a choice among unequal numbers would be unfair",
                where=f"select.choices.{name}",
                remedy="Run the study again.",
            )
        tried[arm] = float(scores[arm].sums(by).mean(0).sum() / scores[arm].weights(by).sum())
    sign = 1 if setting.unit.higher_is_better else -1
    best = max(choice.among, key=lambda arm: sign * tried[arm])
    return Chosen(name=name, arm=best, baseline=choice.baseline, tried=tried)


def arms_to_test(study_arms: Sequence[str], chosen: Sequence[Chosen]) -> list[str]:
    """The chosen arms, and baselines that are arms, in the study's order."""
    wanted = {choice.arm for choice in chosen} | {choice.baseline for choice in chosen}
    return [arm for arm in study_arms if arm in wanted]
