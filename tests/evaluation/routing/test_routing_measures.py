"""Every measure against scipy or a plain loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy
from scipy.stats import mannwhitneyu

from symphony_vlm.evaluation.routing.association import flip_association
from symphony_vlm.evaluation.routing.measures import (
    coefficient_of_variation,
    entropy,
    jaccard_of_shared,
    jensen_shannon,
    kappa,
    normalized,
    rank_margin,
    roc_areas,
    shared_experts,
    sparse_rows,
    total_variation,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _distributions(rng: np.random.Generator, *shape: int) -> Any:
    """Some with zeros in them."""
    values = rng.dirichlet(np.full(shape[-1], 0.5), size=shape[:-1])
    values[rng.random(shape) < 0.2] = 0
    values[..., 0] += 1e-3
    return values / values.sum(-1, keepdims=True)


def test_jensen_shannon_is_the_square_of_scipys_distance(rng: np.random.Generator) -> None:
    p, q = _distributions(rng, 4, 5, 6), _distributions(rng, 4, 5, 6)
    found = jensen_shannon(p, q)
    for index in np.ndindex(4, 5):
        # scipy takes a root and we square it: a few units in the last place of numbers up to 1.
        assert found[index] == pytest.approx(jensenshannon(p[index], q[index], base=2) ** 2, abs=1e-14)


def test_jensen_shannon_of_equal_and_of_disjoint_distributions_is_exactly_0_and_1(rng: np.random.Generator) -> None:
    p = _distributions(rng, 50, 8).astype(np.float32)
    assert (jensen_shannon(p, p) == 0).all()
    assert jensen_shannon(np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.25, 0.75])) == 1
    assert np.isnan(jensen_shannon(np.full(3, np.nan), np.array([1.0, 0, 0])))


def test_entropy_and_total_variation(rng: np.random.Generator) -> None:
    p, q = _distributions(rng, 20, 6), _distributions(rng, 20, 6)
    np.testing.assert_allclose(entropy(p), scipy_entropy(p, axis=-1), atol=1e-14)
    loop: list[float] = [0.5 * sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    np.testing.assert_allclose(total_variation(p, q), loop, atol=1e-15)


def test_scores_that_do_not_sum_to_one_become_distributions() -> None:
    scores = np.array([[2.0, 1.0, 1.0], [0.2, -0.3, 0.0], [0.0, 0.0, 0.0]])
    expected = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    assert normalized(scores) == pytest.approx(expected)


@pytest.mark.parametrize("num_selected", [1, 2, 3])
def test_shared_experts_and_jaccard_are_those_of_sets(rng: np.random.Generator, num_selected: int) -> None:
    one, other = (np.array([rng.permutation(5)[:num_selected] for _ in range(40)], dtype=np.uint8) for _ in range(2))
    shared = shared_experts(one, other)
    assert shared.tolist() == [len(set(a) & set(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True)]
    unions = np.array([len(set(a) | set(b)) for a, b in zip(one.tolist(), other.tolist(), strict=True)])
    assert jaccard_of_shared(shared, num_selected) == pytest.approx(shared / unions)


def test_kappa_is_0_on_average_for_unrelated_selections_and_1_for_equal_ones(rng: np.random.Generator) -> None:
    def selections(n: int) -> Any:
        return np.argsort(rng.gumbel(size=(n, 6)) + np.log([0.4, 0.3, 0.1, 0.1, 0.05, 0.05]), axis=1)[:, ::-1][:, :2]

    def share(selected: Any) -> Any:
        return np.bincount(selected.ravel(), minlength=6) / len(selected)

    one, other = selections(20_000), selections(20_000)
    overlap = shared_experts(one, other).mean() / 2
    # The overlap's standard error is below 0.32 / sqrt(20000) = 0.0023, and 1 - e is above 0.6: five of them.
    assert abs(kappa(np.array(overlap), share(one), share(other), 2)) < 5 * 0.0023 / 0.6
    assert overlap > 0.2, "which a stability without kappa would have been proud of"
    assert kappa(np.array(1.0), share(one), share(one), 2) == 1


def test_kappa_of_a_collapsed_router_is_not_defined() -> None:
    share = np.array([1.0, 1.0, 0.0])
    assert np.isnan(kappa(np.array(1.0), share, share, 2))


def test_the_margin_is_between_rank_k_and_the_next(rng: np.random.Generator) -> None:
    scores = rng.random((30, 5))
    for k in range(1, 5):
        loop = [sorted(row, reverse=True)[k - 1] - sorted(row, reverse=True)[k] for row in scores.tolist()]
        np.testing.assert_array_equal(rank_margin(scores, k), loop)
    assert np.isnan(rank_margin(scores, 5)).all()


def test_sparse_rows_put_weights_in_their_experts_places(rng: np.random.Generator) -> None:
    indices = np.array([rng.permutation(5)[:2] for _ in range(10)], dtype=np.uint8)
    weights = rng.random((10, 2))
    rows = sparse_rows(weights, indices, 5)
    for row, index, weight in zip(rows, indices, weights, strict=True):
        assert {e: v for e, v in enumerate(row) if v} == dict(zip(index.tolist(), weight.tolist(), strict=True))


def test_the_coefficient_of_variation_of_an_even_and_of_a_collapsed_load() -> None:
    assert coefficient_of_variation(np.array([3, 3, 3])) == 0
    # All on one of E experts: sqrt(E - 1).
    assert coefficient_of_variation(np.array([8, 0, 0, 0])) == pytest.approx(math.sqrt(3))
    assert np.isnan(coefficient_of_variation(np.array([0, 0])))


def test_the_roc_area_is_mann_and_whitneys_statistic(rng: np.random.Generator) -> None:
    values = rng.integers(0, 8, 60).astype(float)  # with ties
    positive = rng.random(60) < 0.4
    expected = mannwhitneyu(values[positive], values[~positive]).statistic / positive.sum() / (~positive).sum()
    assert roc_areas(values, positive, np.ones((1, 60)))[0] == pytest.approx(expected, abs=1e-12)


def test_the_roc_area_with_weights_is_that_of_repeated_samples(rng: np.random.Generator) -> None:
    values, positive = rng.integers(0, 5, 20).astype(float), rng.random(20) < 0.5
    weights = rng.integers(0, 4, (3, 20)).astype(float)
    for row, found in zip(weights, roc_areas(values, positive, weights), strict=True):
        times = row.astype(int)
        repeated = roc_areas(np.repeat(values, times), np.repeat(positive, times), np.ones((1, times.sum())))
        assert found == pytest.approx(repeated[0], abs=1e-12)
    none = np.where(positive, 0.0, 1.0)[None]
    assert np.isnan(roc_areas(values, positive, none)[0])


def test_an_association_is_found_where_there_is_one(rng: np.random.Generator) -> None:
    drift = rng.random(300)
    clean = np.ones(300)
    clean[:50] = 0  # wrong from the start: these count nowhere
    flips = rng.random(300) < 0.2 + 0.5 * drift
    images = [f"{n // 3}.png" for n in range(300)]
    found = flip_association(drift, clean, np.where(flips, 0.0, 1.0), images, seed=0, n_resamples=500)
    assert found["n_flips"] == flips[50:].sum() and found["n_flips"] + found["n_kept"] == 250
    assert 0.5 < found["ci_low"] < found["value"] < found["ci_high"] < 1
    nothing = flip_association(drift, clean, clean, images, seed=0, n_resamples=500)
    assert nothing["value"] is None and nothing["n_flips"] == 0


def test_items_without_a_score_or_a_drift_are_left_out() -> None:
    drift = np.array([0.1, 0.2, np.nan, 0.4, 0.5])
    clean = np.array([1.0, 1.0, 1.0, np.nan, 1.0])
    after = np.array([1.0, 0.0, 0.0, 0.0, np.nan])
    found = flip_association(drift, clean, after, list("abcde"), seed=0, n_resamples=100)
    assert (found["n_flips"], found["n_kept"], found["value"]) == (1, 1, 1.0)
