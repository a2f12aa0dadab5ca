"""Statistics against scipy, hand values and a small coverage simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from symphony_vlm.evaluation import statistics as st


def _clusters(n_images: int, per_image: int) -> list[str]:
    return [f"image{i}" for i in range(n_images) for _ in range(per_image)]


@pytest.mark.parametrize(("right", "n"), [(0, 10), (10, 10), (7, 10), (431, 1000), (1, 1)])
def test_wilson_equals_scipy(right: int, n: int) -> None:
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    got = st.wilson_interval(right, n)
    assert (got.value, got.low, got.high) == pytest.approx((right / n, expected.low, expected.high), abs=1e-12)


def test_wilson_of_newcombe() -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: 81 of 263 and 1 of 29, to four places."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)):
        got = st.wilson_interval(right, n)
        assert (round(got.low, 4), round(got.high, 4)) == (low, high)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_what_is_no_proportion(right: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        st.wilson_interval(right, n)


def test_mcnemar() -> None:
    assert st.mcnemar(10, 2) == st.mcnemar(2, 10) == pytest.approx(0.03857421875, abs=1e-15)
    assert st.mcnemar(0, 0) == 1.0
    assert st.mcnemar(5, 5) == 1.0
    assert st.mcnemar(3, 17) == pytest.approx(stats.binomtest(3, 20).pvalue)


def test_holm_vector_and_order() -> None:
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.9, 0.8]) == [1.0, 1.0]
    assert st.holm([]) == []


def test_benjamini_hochberg() -> None:
    assert st.benjamini_hochberg([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert st.benjamini_hochberg([]) == []


def test_adjusted_p_values_of_r() -> None:
    """R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05)) with "holm" and "BH"."""
    p = [0.01, 0.02, 0.03, 0.04, 0.05]
    assert st.holm(p) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert st.benjamini_hochberg(p) == pytest.approx([0.05] * 5)


def test_adjusted_p_values_equal_their_definitions() -> None:
    """Holm rejects step by step; Benjamini and Hochberg reject up to the last rank below its line."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = list(np.round(rng.random(12) ** 2, 3))  # ties too
        order = sorted(range(12), key=p.__getitem__)
        for level in (0.01, 0.05, 0.2):
            steps = 0
            while steps < 12 and p[order[steps]] <= level / (12 - steps):
                steps += 1
            assert {i for i in range(12) if st.holm(p)[i] <= level} == set(order[:steps])
            last = max((rank + 1 for rank in range(12) if p[order[rank]] <= level * (rank + 1) / 12), default=0)
            assert {i for i in range(12) if st.benjamini_hochberg(p)[i] <= level + 1e-12} == set(order[:last])


def test_weights_do_not_depend_on_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(st.bootstrap_weights(7, seed=3, n_resamples=50)))
    monkeypatch.setattr(st, "_MAX_WEIGHTS", 22)
    chunks = list(st.bootstrap_weights(7, seed=3, n_resamples=50))
    assert len(chunks) == 17
    assert max(chunk.size for chunk in chunks) <= 22
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    assert (whole.sum(1) == 7).all()


def test_weights_are_multinomial() -> None:
    weights = np.concatenate(list(st.bootstrap_weights(5, seed=0, n_resamples=20_000)))
    assert weights.mean(0) == pytest.approx(np.ones(5), abs=0.03)
    assert weights.var(0) == pytest.approx(np.full(5, 0.8), abs=0.04)
    assert np.cov(weights[:, 0], weights[:, 1])[0, 1] == pytest.approx(-0.2, abs=0.03)


def test_bootstrap_equals_scipy_for_single_item_clusters() -> None:
    scores = np.random.default_rng(0).random(80)
    ours = st.clustered_bootstrap_mean(scores, [f"{i:03d}" for i in range(80)], seed=1)
    theirs = stats.bootstrap(
        (scores,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == pytest.approx(scores.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_clusters_widen_the_interval() -> None:
    scores = np.repeat(np.arange(40) % 2, 6).astype(float)
    clustered = st.clustered_bootstrap_mean(scores, _clusters(40, 6), seed=0)
    independent = st.clustered_bootstrap_mean(scores, [str(i) for i in range(240)], seed=0)
    assert (clustered.high - clustered.low) / (independent.high - independent.low) == pytest.approx(6**0.5, rel=0.1)


def test_order_of_items_and_seed() -> None:
    rng = np.random.default_rng(4)
    scores, clusters = rng.random(60), np.array(_clusters(20, 3))
    order = rng.permutation(60)
    first = st.clustered_bootstrap_mean(scores, list(clusters), seed=5, n_resamples=500)
    again = st.clustered_bootstrap_mean(scores[order], list(clusters[order]), seed=5, n_resamples=500)
    assert (first.value, first.low, first.high) == pytest.approx((again.value, again.low, again.high), abs=1e-12)
    other = st.clustered_bootstrap_mean(scores, list(clusters), seed=6, n_resamples=500)
    assert first.low != other.low


def test_missing_scores_are_left_out_by_column() -> None:
    scores = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, 1.0]])
    means, replicates = st.resampled_means(scores, ["a", "b", "c"], seed=0, n_resamples=200)
    assert means == pytest.approx([0.5, 1.0])
    finite = replicates[:, 1][np.isfinite(replicates[:, 1])]
    assert (finite == 1.0).all()


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="clusters"):
        st.clustered_bootstrap_mean([1.0, 0.0], ["a"], seed=0)
    with pytest.raises(ValueError, match="at least 1 cluster"):
        next(st.bootstrap_weights(0, seed=0, n_resamples=1))


def test_paired_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 120).astype(float)
    clusters = _clusters(30, 4)
    shifted = st.paired_difference(first, first + 0.25, clusters, seed=0)
    assert (shifted.value, shifted.low, shifted.high) == pytest.approx((0.25, 0.25, 0.25))
    assert shifted.excludes_zero
    assert not st.paired_difference(first, first, clusters, seed=0).excludes_zero


def test_difference_in_differences_by_hand() -> None:
    clean_a, bad_a = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0, 0.0])
    clean_b, bad_b = np.array([1.0, 1.0, 0.0, 1.0]), np.array([1.0, 1.0, 0.0, 0.0])
    got = st.difference_in_differences(clean_a, bad_a, clean_b, bad_b, ["a", "b", "c", "d"], seed=0)
    assert got.value == pytest.approx((0.5 - 0.75) - (0.25 - 0.75))
    assert got.low < got.value < got.high


def test_sign_flips_enumerated_equal_brute_force() -> None:
    per_cluster = np.array([1.0, -2.0, 3.0, 3.0, 0.0, 1.0])
    brute = np.mean([abs(np.dot(s, per_cluster)) >= 6 for s in itertools.product([-1, 1], repeat=6)])
    assert st.sign_flip_tests(per_cluster[:, None], list("abcdef"), seed=0)[0] == pytest.approx(brute)


def test_sign_flips_drawn_agree_with_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(1).normal(0.4, 1, (14, 2))
    names = [f"{i:02d}" for i in range(14)]
    exact = st.sign_flip_tests(differences, names, seed=0)
    monkeypatch.setattr(st, "_MAX_EXACT_CLUSTERS", 3)
    assert st.sign_flip_tests(differences, names, seed=0) == pytest.approx(exact, abs=0.006)


def test_sign_flips_of_nothing() -> None:
    assert st.sign_flip_tests(np.zeros((6, 1)), _clusters(3, 2), seed=0) == [1.0]


def test_coverage_of_the_clustered_interval() -> None:
    """Correlated questions of one image: the 95 % interval covers the truth in about 95 % of worlds."""
    rng = np.random.default_rng(7)
    covered = 0
    for world in range(200):
        chance = rng.beta(2, 2, 60)
        scores = (rng.random((60, 4)) < chance[:, None]).astype(float).ravel()
        interval = st.clustered_bootstrap_mean(scores, _clusters(60, 4), seed=world, n_resamples=400)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_bca_equals_scipy_on_the_same_replicates() -> None:
    scores = np.random.default_rng(3).exponential(size=60)
    drawn = stats.bootstrap((scores,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(4))
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=0, method="BCa", bootstrap_result=drawn)
    left_out = st.left_out_means(scores[:, None], [f"{i:02d}" for i in range(60)])[:, 0]
    ours = st.bca_interval(float(scores.mean()), drawn.bootstrap_distribution, left_out)
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), rel=1e-9)
    plain = st.percentile_interval(float(scores.mean()), drawn.bootstrap_distribution)
    assert ours.high > plain.high  # what the correction of a skewed statistic does


def test_bca_is_not_defined_on_one_side() -> None:
    assert st.bca_interval(1.0, np.linspace(0, 0.5, 100), np.linspace(0, 1, 9)) is None
    assert st.bca_interval(1.0, np.linspace(0, 2, 100), [1.0]) is None
    same = st.bca_interval(0.25, np.full(50, 0.25), np.full(9, 0.25))
    assert same is not None
    assert (same.low, same.high) == (0.25, 0.25)


def test_left_out_means_equal_a_loop() -> None:
    rng = np.random.default_rng(5)
    scores = rng.random((30, 2))
    scores[3, 1] = np.nan
    clusters = np.array([f"c{i // 5}" for i in rng.permutation(30)])
    loop = [np.nanmean(scores[clusters != name], axis=0) for name in sorted(set(clusters))]
    np.testing.assert_allclose(st.left_out_means(scores, list(clusters)), loop, rtol=1e-12)


def test_t_interval_equals_scipy() -> None:
    values = [0.61, 0.64, 0.58]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    got = st.t_interval(values)
    assert (got.value, got.low, got.high) == pytest.approx((np.mean(values), low, high))
    with pytest.raises(ValueError, match="at least 2 values"):
        st.t_interval([0.5])


def test_welch_interval_equals_scipy() -> None:
    first, second = [0.61, 0.64, 0.58], [0.70, 0.66, 0.71, 0.9]
    theirs = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    got = st.welch_interval(first, second)
    assert (got.low, got.high) == pytest.approx((theirs.low, theirs.high))
    still = st.welch_interval([0.5, 0.5], [0.75, 0.75])
    assert (still.value, still.low, still.high) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="1 and 2"):
        st.welch_interval([0.5], [0.5, 0.6])
