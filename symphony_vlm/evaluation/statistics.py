"""Intervals and tests for scores of items that come in clusters (several questions about one image).

Everything here is a pure function of its arguments. Items of one image are not independent, so every resampling
draws whole images. Resampled weights depend on the seed and on the sorted cluster names only: two calls with the same
seed and the same images use the same weights, which is what makes differences of models paired.

Shape letters: I items, G clusters (images), M columns (cells or models), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = [
    "Interval",
    "bca_interval",
    "benjamini_hochberg",
    "bootstrap_weights",
    "clustered_bootstrap_mean",
    "difference_in_differences",
    "holm",
    "left_out_means",
    "mcnemar",
    "paired_difference",
    "percentile_interval",
    "resampled_means",
    "sign_flip_tests",
    "t_interval",
    "welch_interval",
    "wilson_interval",
]

Floats = NDArray[np.float64]

_MAX_WEIGHTS = 2_000_000
"""Weights held at a time: 16 MB, whatever the number of images and resamples."""
_MAX_EXACT_CLUSTERS = 20
"""Sign flips are enumerated (at most 2^20 of them) up to this number of non-zero clusters."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and its two-sided confidence interval."""

    value: float
    low: float
    high: float
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion of independent items (Wilson 1927).

    Args:
        successes: Number of right items, 0 to ``n``.
        n: Number of items, at least 1.
        level: Confidence.

    Raises:
        ValueError: ``n`` is 0 or ``successes`` is outside 0 to ``n``.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval: {successes} of {n} is no proportion; need 0 <= successes <= n and n >= 1")
    z = float(stats.norm.ppf(0.5 + level / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # The two ends are exact at the borders; rounding would put them at 1e-17 and 1 - 1e-16.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(value=share, low=low, high=high, level=level)


def bootstrap_weights(n_clusters: int, *, seed: int, n_resamples: int) -> Iterator[Floats]:
    """Multinomial weights: how often each cluster occurs in each resample of ``n_clusters`` draws with replacement.

    Args:
        n_clusters: G, at least 1.
        seed: The weights are a function of (seed, G, R); the chunking does not change them.
        n_resamples: R.

    Yields:
        ``[<= R, G]`` float64 chunks whose rows sum to G, R rows in all.
    """
    if n_clusters < 1 or n_resamples < 1:
        raise ValueError(f"bootstrap needs at least 1 cluster and 1 resample, got {n_clusters} and {n_resamples}")
    rng = np.random.default_rng(seed)
    rows = max(1, _MAX_WEIGHTS // n_clusters)
    for start in range(0, n_resamples, rows):
        count = min(rows, n_resamples - start)
        # Counting uniform draws is the multinomial, several times faster than sampling it cluster by cluster.
        draws = rng.integers(0, n_clusters, size=(count, n_clusters))
        flat = draws + n_clusters * np.arange(count)[:, None]
        counts = np.bincount(flat.ravel(), minlength=count * n_clusters)
        yield counts.reshape(count, n_clusters).astype(np.float64)


def resampled_means(
    scores_IM: ArrayLike, clusters: Sequence[str], *, seed: int, n_resamples: int = 10_000
) -> tuple[Floats, Floats]:
    """Column means and their image-clustered bootstrap replicates, all columns under the same weights.

    Args:
        scores_IM: ``[I, M]``; NaN marks an item without a score in that column and is left out of its mean.
        clusters: I cluster names; their order does not matter.
        seed: Seed of the weights.
        n_resamples: R.

    Returns:
        Means ``[M]`` and replicates ``[R, M]``; NaN where a column (or a resample of it) holds no item.
    """
    sums_GM, counts_GM = _cluster_sums(scores_IM, clusters)
    with np.errstate(invalid="ignore"):
        means = sums_GM.sum(0) / counts_GM.sum(0)
        replicates = [
            (weights_RG @ sums_GM) / (weights_RG @ counts_GM)
            for weights_RG in bootstrap_weights(len(sums_GM), seed=seed, n_resamples=n_resamples)
        ]
    return means, np.concatenate(replicates)


def left_out_means(scores_IM: ArrayLike, clusters: Sequence[str]) -> Floats:
    """Column means without one cluster each, which is what `bca_interval` needs beside the replicates.

    Args:
        scores_IM: ``[I, M]``; NaN as in `resampled_means`.
        clusters: I cluster names.

    Returns:
        ``[G, M]``, clusters in the order of their names; NaN where nothing is left.
    """
    sums_GM, counts_GM = _cluster_sums(scores_IM, clusters)
    with np.errstate(invalid="ignore"):
        left_GM: Floats = (sums_GM.sum(0) - sums_GM) / (counts_GM.sum(0) - counts_GM)
    return left_GM


def _cluster_sums(scores_IM: ArrayLike, clusters: Sequence[str]) -> tuple[Floats, Floats]:
    """Sums and numbers of scores, ``[G, M]`` each."""
    scores = np.asarray(scores_IM, dtype=np.float64)
    if scores.ndim != 2 or len(scores) != len(clusters) or not len(clusters):
        raise ValueError(f"scores {scores.shape} and {len(clusters)} clusters: need [I, M] with I = clusters >= 1")
    names, cluster_I = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    present = ~np.isnan(scores)
    sums_GM = np.zeros((len(names), scores.shape[1]))
    counts_GM = np.zeros_like(sums_GM)
    np.add.at(sums_GM, cluster_I, np.where(present, scores, 0.0))
    np.add.at(counts_GM, cluster_I, present)
    return sums_GM, counts_GM


def percentile_interval(value: float, replicates: ArrayLike, *, level: float = 0.95) -> Interval:
    """The percentile interval of bootstrap replicates; replicates that are not finite are left out."""
    finite = np.asarray(replicates, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        raise ValueError("percentile_interval: no finite replicate")
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=float(value), low=float(low), high=float(high), level=level)


def bca_interval(value: float, replicates: ArrayLike, left_out: ArrayLike, *, level: float = 0.95) -> Interval | None:
    """The bias-corrected and accelerated interval of bootstrap replicates (Efron 1987).

    Args:
        value: The estimate.
        replicates: ``[R]``; those that are not finite are left out.
        left_out: ``[G]`` the estimate without one cluster each; not finite ones are left out.
        level: Confidence.

    Returns:
        None where it is not defined: fewer than two finite estimates without a cluster, or all replicates on one side
        of the estimate.
    """
    drawn = np.asarray(replicates, dtype=np.float64)
    drawn = drawn[np.isfinite(drawn)]
    jackknife = np.asarray(left_out, dtype=np.float64)
    jackknife = jackknife[np.isfinite(jackknife)]
    if not len(drawn) or len(jackknife) < 2:
        return None
    if np.ptp(drawn) == 0 and drawn[0] == value:
        return Interval(value=float(value), low=float(value), high=float(value), level=level)
    # Scores are discrete: replicates equal to the estimate lie half below it.
    below = float((drawn < value).mean() + (drawn == value).mean() / 2)
    if below in (0.0, 1.0):
        return None
    bias = float(stats.norm.ppf(below))
    deviations = jackknife.mean() - jackknife
    spread = float((deviations**2).sum())
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(drawn, stats.norm.cdf(bias + z / (1 - acceleration * z)))
    return Interval(value=float(value), low=float(low), high=float(high), level=level)


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Student's interval of the mean of independent values, one for each training seed.

    Args:
        values: At least two.
        level: Confidence.

    Raises:
        ValueError: Fewer than two values: one run says nothing about another seed.
    """
    if len(values) < 2:
        raise ValueError(f"t_interval needs at least 2 values, got {len(values)}")
    array = np.asarray(values, dtype=np.float64)
    return _t_interval(float(array.mean()), float(array.std(ddof=1)) / math.sqrt(len(array)), len(array) - 1, level)


def welch_interval(first: Sequence[float], second: Sequence[float], *, level: float = 0.95) -> Interval:
    """Welch's interval of ``mean(second) - mean(first)`` of two independent groups (Welch 1947).

    Args:
        first: At least two values.
        second: At least two values.
        level: Confidence.

    Raises:
        ValueError: A group has fewer than two values.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"welch_interval needs at least 2 values a group, got {len(first)} and {len(second)}")
    parts = [np.asarray(group, dtype=np.float64) for group in (first, second)]
    squared = [float(part.var(ddof=1)) / len(part) for part in parts]
    below = sum(v * v / (len(part) - 1) for v, part in zip(squared, parts, strict=True))
    # Two groups without any spread: the interval is a point, whatever the degrees of freedom.
    freedom = sum(squared) ** 2 / below if below > 0 else 1.0
    return _t_interval(float(parts[1].mean() - parts[0].mean()), math.sqrt(sum(squared)), freedom, level)


def _t_interval(value: float, error: float, freedom: float, level: float) -> Interval:
    half = float(stats.t.ppf(0.5 + level / 2, freedom)) * error
    return Interval(value=value, low=value - half, high=value + half, level=level)


def clustered_bootstrap_mean(
    scores: ArrayLike, clusters: Sequence[str], *, seed: int, n_resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Mean of item scores with an image-clustered percentile bootstrap interval.

    Args:
        scores: ``[I]``.
        clusters: I cluster names (the image of each item).
        seed: Equal seeds and equal cluster names give equal weights.
        n_resamples: R.
        level: Confidence.
    """
    means, replicates = resampled_means(
        np.asarray(scores, dtype=np.float64)[:, None], clusters, seed=seed, n_resamples=n_resamples
    )
    return percentile_interval(means[0], replicates[:, 0], level=level)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    clusters: Sequence[str],
    *,
    seed: int,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """``mean(second) - mean(first)`` over the same items, with a clustered bootstrap interval.

    Args:
        first: ``[I]``; an item that is NaN on either side is left out of both.
        second: ``[I]``.
        clusters: I cluster names.
        seed: Seed of the weights.
        n_resamples: R.
        level: Confidence.
    """
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return clustered_bootstrap_mean(difference, clusters, seed=seed, n_resamples=n_resamples, level=level)


def difference_in_differences(
    clean_a: ArrayLike,
    corrupted_a: ArrayLike,
    clean_b: ArrayLike,
    corrupted_b: ArrayLike,
    clusters: Sequence[str],
    *,
    seed: int,
    n_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """``(corrupted_b - clean_b) - (corrupted_a - clean_a)``: positive when B loses less than A.

    Args:
        clean_a: ``[I]`` scores of model A; an item that is NaN anywhere is left out.
        corrupted_a: ``[I]``.
        clean_b: ``[I]`` scores of model B on the same items.
        corrupted_b: ``[I]``.
        clusters: I cluster names.
        seed: Seed of the weights.
        n_resamples: R.
        level: Confidence.
    """
    drop_a = np.asarray(corrupted_a, dtype=np.float64) - np.asarray(clean_a, dtype=np.float64)
    drop_b = np.asarray(corrupted_b, dtype=np.float64) - np.asarray(clean_b, dtype=np.float64)
    return paired_difference(drop_a, drop_b, clusters, seed=seed, n_resamples=n_resamples, level=level)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided McNemar test.

    Args:
        b: Items that went from right to wrong.
        c: Items that went from wrong to right.

    Returns:
        ``min(1, 2 sum_{k <= min(b, c)} C(n, k) / 2^n)`` with n = b + c; 1 where n is 0.
    """
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar: counts must not be negative, got b={b}, c={c}")
    if b + c == 0:
        return 1.0
    return min(1.0, 2.0 * float(stats.binom.cdf(min(b, c), b + c, 0.5)))


def sign_flip_tests(
    differences_IM: ArrayLike, clusters: Sequence[str], *, seed: int, n_draws: int = 100_000
) -> list[float]:
    """Two-sided p-values of "no difference", by flipping the sign of whole clusters (swapping the two labels).

    Args:
        differences_IM: ``[I, M]``, one hypothesis per column; NaN items do not count.
        clusters: I cluster names.
        seed: Seed of the draws; every column sees the same signs.
        n_draws: Random flips where a column has more than 20 non-zero clusters; fewer are enumerated.

    Returns:
        M values. Random flips give ``(1 + hits) / (1 + draws)``, which is never 0.
    """
    differences = np.asarray(differences_IM, dtype=np.float64)
    names, cluster_I = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums_GM = np.zeros((len(names), differences.shape[1]))
    np.add.at(sums_GM, cluster_I, np.nan_to_num(differences, nan=0.0))
    sums_GM[np.abs(sums_GM) < 1e-12] = 0.0
    # Equal sums in another order may differ in the last bits: they are ties, and ties count as hits.
    observed_M = np.abs(sums_GM.sum(0)) - 1e-9
    exact_M = (sums_GM != 0).sum(0) <= _MAX_EXACT_CLUSTERS
    p_values = np.ones(differences.shape[1])
    for column in np.flatnonzero(exact_M):
        p_values[column] = _enumerated_p(sums_GM[:, column], float(observed_M[column]))
    random_M = np.flatnonzero(~exact_M)
    if len(random_M):
        hits = np.zeros(len(random_M))
        rng = np.random.default_rng(seed)
        rows = max(1, _MAX_WEIGHTS // len(names))
        for start in range(0, n_draws, rows):
            size = (min(rows, n_draws - start), len(names))
            signs = 2.0 * rng.integers(0, 2, size=size) - 1.0
            hits += (np.abs(signs @ sums_GM[:, random_M]) >= observed_M[random_M]).sum(0)
        p_values[random_M] = (1 + hits) / (1 + n_draws)
    return [float(p) for p in p_values]


def _enumerated_p(sums_G: Floats, observed: float) -> float:
    totals = np.zeros(1)
    for value in sums_G[sums_G != 0]:
        totals = np.concatenate([totals + value, totals - value])
    return float((np.abs(totals) >= observed).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: ``max_{i <= j} min(1, (m - i + 1) p_(i))``, in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.arange(len(p), 0, -1) * p[order])
    result = np.empty_like(p)
    result[order] = np.maximum.accumulate(adjusted)
    return [float(x) for x in result]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values (false discovery rate), in the order given."""
    if not len(p_values):
        return []
    return [float(x) for x in stats.false_discovery_control(np.asarray(p_values, dtype=np.float64), method="bh")]
