"""A benchmark's figures as functions of sums over items, so that each can be bootstrapped over images as it is.

F1, acc+ and circular accuracy are no means of item scores. All are functions of sums: a metric gives every outcome a
row of terms and combines the sums of the rows. Resampling images multiplies rows by weights, which is one matrix
product for all metrics of a task.

Shape letters: N outcomes, m terms of a metric, G images, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from symphony_vlm.evaluation.item import Outcome
from symphony_vlm.evaluation.statistics import Floats, Interval, bootstrap_weights, percentile_interval

__all__ = [
    "Metric",
    "Outcome",
    "accuracy_metrics",
    "group_accuracies",
    "lenient_score",
    "mean_of",
    "metric_intervals",
    "metric_values",
    "share",
]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One figure of a benchmark.

    Attributes:
        name: As in ``results.json``; ``accuracy/colour`` for a part of the items.
        terms: Outcomes -> ``[N, m]``. What belongs to a group of outcomes (both questions of an MME picture) stands in
            the row of the group's first outcome, zeros elsewhere; groups must not share parts of different images.
        combine: Sums ``[..., m]`` -> values ``[...]``; a denominator of 0 gives NaN (see `share`).
        scale: The best value, so that ``value / scale`` is in 0 to 1.
        higher_is_better: Whether more is better.
        where: Which outcomes the figure is about, for its number of items; None: all.
    """

    name: str
    terms: Callable[[Sequence[Outcome]], Floats]
    combine: Callable[[Floats], Floats]
    scale: float = 1.0
    higher_is_better: bool = True
    where: Callable[[Outcome], bool] | None = None

    def members(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes that the figure is about."""
        return [outcome for outcome in outcomes if self.where is None or self.where(outcome)]


def share(sums: Floats) -> Floats:
    """``[..., 2]`` -> first over second; NaN where the second is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] == 0, np.nan, sums[..., 0] / sums[..., 1])


def mean_of(
    name: str,
    values: Callable[[Outcome], float | None] = lambda outcome: outcome.scored.score,
    *,
    where: Callable[[Outcome], bool] | None = None,
    scale: float = 1.0,
    higher_is_better: bool = True,
) -> Metric:
    """The mean of a value per outcome, times ``scale``.

    Args:
        name: The metric's.
        values: Outcome -> 0 to 1; None leaves the outcome out of the mean. Default: the score.
        where: Leaves all other outcomes out.
        scale: 100 for a percentage.
        higher_is_better: Whether more is better.
    """

    def terms(outcomes: Sequence[Outcome]) -> Floats:
        rows = np.zeros((len(outcomes), 2))
        for row, outcome in zip(rows, outcomes, strict=True):
            value = values(outcome) if where is None or where(outcome) else None
            if value is not None:
                row[:] = value, 1.0
        return rows

    return Metric(
        name=name,
        terms=terms,
        combine=lambda sums: scale * share(sums),
        scale=scale,
        higher_is_better=higher_is_better,
        where=where,
    )


def accuracy_metrics(outcomes: Sequence[Outcome]) -> list[Metric]:
    """What a task has unless it says otherwise: accuracy, by the lenient rule where there is one, and per group."""
    lenient = any(outcome.scored.lenient is not None for outcome in outcomes)
    more = [mean_of("accuracy_lenient", lenient_score)] if lenient else []
    return [mean_of("accuracy"), *more, *group_accuracies(outcomes)]


def lenient_score(outcome: Outcome) -> float:
    """The score by the forgiving rule; of an outcome without one (a missing prediction) the score."""
    lenient = outcome.scored.lenient
    return outcome.scored.score if lenient is None else lenient


def group_accuracies(
    outcomes: Sequence[Outcome],
    group: Callable[[Outcome], str | None] = lambda outcome: outcome.item.group,
    *,
    prefix: str = "accuracy",
) -> list[Metric]:
    """``prefix/name`` for each group of outcomes, names sorted; none if there are fewer than two groups."""
    names = sorted({name for outcome in outcomes if (name := group(outcome)) is not None})
    if len(names) < 2:
        return []
    return [mean_of(f"{prefix}/{name}", where=_in_group(group, name)) for name in names]


def _in_group(group: Callable[[Outcome], str | None], name: str) -> Callable[[Outcome], bool]:
    return lambda outcome: group(outcome) == name


def metric_values(metrics: Sequence[Metric], outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """The values, by name; None where a denominator is 0."""
    values = {metric.name: float(metric.combine(metric.terms(outcomes).sum(0))) for metric in metrics}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def metric_intervals(
    metrics: Sequence[Metric],
    outcomes: Sequence[Outcome],
    *,
    seed: int,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> dict[str, Interval | None]:
    """Values with image-clustered percentile bootstrap intervals, all metrics under the same weights.

    Args:
        metrics: Of one task.
        outcomes: At least one.
        seed: Of the weights, which also depend on the images' names.
        n_resamples: R.
        level: Confidence.

    Returns:
        By name; None where the value's denominator is 0. Resamples of denominator 0 are left out of the interval.
    """
    terms = [metric.terms(outcomes) for metric in metrics]
    names, cluster_N = np.unique(
        [outcome.item.cluster or outcome.item.image_key for outcome in outcomes], return_inverse=True
    )
    sums_GM = np.zeros((len(names), sum(part.shape[1] for part in terms)))
    np.add.at(sums_GM, cluster_N, np.concatenate(terms, axis=1))
    sums_RM = np.concatenate(
        [weights_RG @ sums_GM for weights_RG in bootstrap_weights(len(names), seed=seed, n_resamples=n_resamples)]
    )
    intervals: dict[str, Interval | None] = {}
    start = 0
    for metric, part in zip(metrics, terms, strict=True):
        value = float(metric.combine(part.sum(0)))
        replicates = metric.combine(sums_RM[:, start : start + part.shape[1]])
        intervals[metric.name] = percentile_interval(value, replicates, level=level) if np.isfinite(value) else None
        start += part.shape[1]
    return intervals
