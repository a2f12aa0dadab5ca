"""What the cells of a study say together: means over seeds, and arms against their baselines.

Seeds and clusters (pictures, stretches of text) are both drawn again, independently of each other: an arm's figure
would be another with other seeds and with other data.

Shape letters: S seeds, G clusters, R resamples.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from symphony_vlm.evaluation.statistics import Interval, bootstrap_weights, percentile_interval, sign_flip_tests
from symphony_vlm.study.scores import Floats

__all__ = ["Comparison", "compare_arms", "compare_seeds", "mean_over_seeds", "ratio_over_seeds"]

N_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Mean of an arm minus that of its baseline, paired by seed and by cluster."""

    interval: Interval
    p_seeds: float | None
    """Paired t-test over the seeds; None with less than two, or if all differ by the same amount."""
    p_data: float
    """Sign flips of whole clusters, for these trained models."""


def mean_over_seeds(sums_SG: ArrayLike, weights_G: ArrayLike, *, seed: int = 0) -> Interval:
    """Sum over weight, the mean over seeds, with a bootstrap of seeds and clusters.

    Args:
        sums_SG: ``[S, G]`` sums over each cluster.
        weights_G: ``[G]``, the same for all seeds.
        seed: of the resamples.
    """
    sums, weights = np.asarray(sums_SG, dtype=np.float64), np.asarray(weights_G, dtype=np.float64)
    value = float(sums.mean(0).sum() / weights.sum())
    return percentile_interval(value, _resampled(sums, weights, seed))


def ratio_over_seeds(
    over_SG: ArrayLike, over_weights_G: ArrayLike, under_SG: ArrayLike, under_weights_G: ArrayLike, *, seed: int = 0
) -> Interval | None:
    """The ratio of two means over seeds, e.g. corrupted over clean accuracy; both see the same resamples.

    Args:
        over_SG: ``[S, G]`` sums above the line.
        over_weights_G: ``[G]``.
        under_SG: ``[S, G]`` sums below, of the same seeds and clusters.
        under_weights_G: ``[G]``.
        seed: of the resamples.

    Returns:
        None if the mean below is 0.
    """
    pairs = [
        (np.asarray(sums, dtype=np.float64), np.asarray(weights, dtype=np.float64))
        for sums, weights in ((over_SG, over_weights_G), (under_SG, under_weights_G))
    ]
    over, under = (sums.mean(0).sum() / weights.sum() for sums, weights in pairs)
    if under == 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        replicates = _resampled(*pairs[0], seed) / _resampled(*pairs[1], seed)
    return percentile_interval(float(over / under), replicates)


def compare_arms(baseline_SG: ArrayLike, arm_SG: ArrayLike, weights_G: ArrayLike, *, seed: int = 0) -> Comparison:
    """An arm against its baseline.

    Args:
        baseline_SG: ``[S, G]`` sums.
        arm_SG: those of the arm, with the same seeds and clusters.
        weights_G: ``[G]``.
        seed: of the resamples and sign flips.
    """
    difference_SG = np.asarray(arm_SG, dtype=np.float64) - np.asarray(baseline_SG, dtype=np.float64)
    weights = np.asarray(weights_G, dtype=np.float64)
    names = [str(index) for index in range(difference_SG.shape[1])]
    [p_data] = sign_flip_tests(difference_SG.mean(0)[:, None], names, seed=seed, n_draws=20_000)
    return Comparison(
        interval=mean_over_seeds(difference_SG, weights, seed=seed),
        p_seeds=_paired_t(difference_SG.sum(1) / weights.sum()),
        p_data=p_data,
    )


def compare_seeds(differences_S: ArrayLike) -> tuple[Interval, float | None]:
    """The mean of paired differences, one a seed, with Student's 95 % interval and the p of the t-test beside it.

    Returns:
        p is None, and the interval a point, where there is no spread to compare with (`Comparison.p_seeds`).
    """
    values = np.asarray(differences_S, dtype=np.float64)
    p = _paired_t(values)
    mean = float(values.mean())
    if p is None or not values.any():
        return Interval(value=mean, low=mean, high=mean), p
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return Interval(value=mean, low=float(low), high=float(high)), p


def _resampled(sums_SG: Floats, weights_G: Floats, seed: int) -> Floats:
    """Means ``[R]`` of drawn seeds and drawn clusters; the draws depend on the seed and the numbers S and G alone."""
    n_seeds, n_clusters = sums_SG.shape
    drawn_RG = _draws(n_clusters, seed)
    chosen_RS = _draws(n_seeds, seed + 1) / n_seeds
    with np.errstate(invalid="ignore"):  # a resample of clusters without weight is left out later
        means_R: Floats = ((chosen_RS @ sums_SG) * drawn_RG).sum(1) / (drawn_RG @ weights_G)
    return means_R


@functools.lru_cache(maxsize=4)
def _draws(n: int, seed: int) -> Floats:
    """How often each of ``n`` is drawn, ``[R, n]``: every figure of a table asks for the same."""
    drawn = np.concatenate(list(bootstrap_weights(n, seed=seed, n_resamples=N_RESAMPLES)))
    drawn.flags.writeable = False
    return drawn


def _paired_t(differences_S: Floats) -> float | None:
    if len(differences_S) < 2 or np.ptp(differences_S) <= 1e-12 * np.abs(differences_S).max():
        # Equal differences, but for rounding, have no spread to compare them with. None at all is no difference.
        return 1.0 if len(differences_S) > 1 and not differences_S.any() else None
    return float(stats.ttest_1samp(differences_S, 0.0).pvalue)
