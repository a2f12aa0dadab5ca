"""Metrics as functions of sums: values, intervals, groups, nulls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.metrics import Metric, accuracy_metrics, mean_of, metric_intervals, metric_values, share
from symphony_vlm.evaluation.statistics import Floats, clustered_bootstrap_mean


def outcome(
    name: str, score: float, *, image: str = "", group: str | None = None, lenient: float | None = None
) -> Outcome:
    item = EvaluationItem(id=name, question="?", answers=("x",), image_key=image or name, group=group)
    return Outcome(item=item, prediction="x", scored=Scored(score=score, parsed="x", lenient=lenient))


OUTCOMES = [
    outcome(str(i), float(score), image=f"image{i % 7}", group="ab"[i % 2])
    for i, score in enumerate(np.random.default_rng(0).integers(0, 2, 40))
]


def test_accuracy_has_the_value_and_the_interval_of_the_clustered_bootstrap() -> None:
    scores = [one.scored.score for one in OUTCOMES]
    images = [one.item.image_key for one in OUTCOMES]
    expected = clustered_bootstrap_mean(scores, images, seed=3, n_resamples=500)
    found = metric_intervals([mean_of("accuracy")], OUTCOMES, seed=3, n_resamples=500)["accuracy"]
    # The same weights and sums of whole numbers: not a bit of difference.
    assert found == expected


def test_groups_use_the_weights_of_all_images() -> None:
    metrics = accuracy_metrics(OUTCOMES)
    assert [metric.name for metric in metrics] == ["accuracy", "accuracy/a", "accuracy/b"]
    alone = metric_intervals(metrics[1:2], OUTCOMES, seed=0, n_resamples=200)["accuracy/a"]
    together = metric_intervals(metrics, OUTCOMES, seed=0, n_resamples=200)["accuracy/a"]
    assert alone == together and alone is not None
    members = [one.scored.score for one in OUTCOMES if one.item.group == "a"]
    assert alone.value == pytest.approx(np.mean(members))
    assert len(metrics[1].members(OUTCOMES)) == len(members) == 20


def test_lenient_accuracy_appears_where_a_rule_has_it() -> None:
    found = [outcome("1", 0.0, lenient=1.0), outcome("2", 1.0, lenient=1.0), outcome("3", 1.0)]
    values = metric_values(accuracy_metrics(found), found)
    assert values == {"accuracy": pytest.approx(2 / 3), "accuracy_lenient": 1.0}
    assert "accuracy_lenient" not in metric_values(accuracy_metrics(OUTCOMES), OUTCOMES)


def test_nothing_to_divide_by_is_null_and_no_exception() -> None:
    nobody = mean_of("nobody", where=lambda one: False)
    assert metric_values([nobody], OUTCOMES) == {"nobody": None}
    assert metric_intervals([nobody], OUTCOMES, seed=0, n_resamples=10) == {"nobody": None}
    assert metric_values([mean_of("unsaid", lambda one: None)], OUTCOMES) == {"unsaid": None}


def test_a_metric_that_is_no_mean_is_resampled_as_it_is() -> None:
    def terms(outcomes: Sequence[Outcome]) -> Floats:
        return np.array([[one.scored.score, 1.0] for one in outcomes])

    squared = Metric(name="squared", terms=terms, combine=lambda sums: share(sums) ** 2)
    values = metric_intervals([squared, mean_of("accuracy")], OUTCOMES, seed=1, n_resamples=300)
    square, accuracy = values["squared"], values["accuracy"]
    assert square is not None and accuracy is not None
    assert square.value == pytest.approx(accuracy.value**2)
    # A monotone function of the mean has the function of its quantiles, up to the interpolation between two replicates.
    assert square.low == pytest.approx(accuracy.low**2, abs=0.01)
    assert square.high == pytest.approx(accuracy.high**2, abs=0.01)


def test_scale_multiplies_and_clusters_win_over_images() -> None:
    assert metric_values([mean_of("percent", scale=100.0)], [outcome("1", 0.25)]) == {"percent": 25.0}
    one, two = outcome("1", 0.0), outcome("2", 1.0)
    spread = metric_intervals([mean_of("m")], [one, two], seed=0, n_resamples=100)["m"]
    bound = [
        Outcome(
            item=EvaluationItem(id=o.item.id, question="?", answers=("x",), image_key=o.item.id, cluster="set"),
            prediction="x",
            scored=o.scored,
        )
        for o in (one, two)
    ]
    fixed = metric_intervals([mean_of("m")], bound, seed=0, n_resamples=100)["m"]
    assert spread is not None and (spread.low, spread.high) == (0.0, 1.0)
    assert fixed is not None and (fixed.low, fixed.high) == (0.5, 0.5)
