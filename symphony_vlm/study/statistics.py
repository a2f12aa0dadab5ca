"""What the cells of a study say together: means over seeds, and arms against their baselines.

Seeds and stretches of the text are both drawn again, independently of each other: an arm's figure would be another with
other seeds and with another text.

Shape letters: S seeds, G clusters of lines, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from symphony_vlm.evaluation.statistics import Interval, bootstrap_weights, percentile_interval, sign_flip_tests

__all__ = ["Comparison", "compare_arms", "mean_nats"]

N_RESAMPLES = 2000
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Nats per word of an arm minus its baseline, paired by seed and by line."""

    interval: Interval
    p_seeds: float | None
    """Paired t-test over the seeds; None with less than two."""
    p_text: float
    """Sign flips of whole clusters, for these trained models."""


def mean_nats(nats_SG: ArrayLike, words_G: ArrayLike, *, seed: int = 0) -> Interval:
    """Nats per word, the mean over seeds, with a bootstrap of seeds and clusters.

    Args:
        nats_SG: ``[S, G]`` sums over each cluster.
        words_G: ``[G]``, the same for all seeds.
        seed: of the resamples.
    """
    nats, words = np.asarray(nats_SG, dtype=np.float64), np.asarray(words_G, dtype=np.float64)
    value = float(nats.mean(0).sum() / words.sum())
    replicates = []
    clusters = bootstrap_weights(nats.shape[1], seed=seed, n_resamples=N_RESAMPLES)
    seeds_RS = np.concatenate(list(bootstrap_weights(nats.shape[0], seed=seed + 1, n_resamples=N_RESAMPLES)))
    done = 0
    for weights_RG in clusters:
        chosen_RS = seeds_RS[done : done + len(weights_RG)] / nats.shape[0]
        replicates.append(((chosen_RS @ nats) * weights_RG).sum(1) / (weights_RG @ words))
        done += len(weights_RG)
    return percentile_interval(value, np.concatenate(replicates))


def compare_arms(baseline_SG: ArrayLike, arm_SG: ArrayLike, words_G: ArrayLike, *, seed: int = 0) -> Comparison:
    """An arm against its baseline.

    Args:
        baseline_SG: ``[S, G]`` nats.
        arm_SG: those of the arm, with the same seeds and lines.
        words_G: ``[G]``.
        seed: of the resamples and sign flips.
    """
    difference_SG = np.asarray(arm_SG, dtype=np.float64) - np.asarray(baseline_SG, dtype=np.float64)
    words = np.asarray(words_G, dtype=np.float64)
    names = [str(index) for index in range(difference_SG.shape[1])]
    [p_text] = sign_flip_tests(difference_SG.mean(0)[:, None], names, seed=seed, n_draws=20_000)
    return Comparison(
        interval=mean_nats(difference_SG, words, seed=seed),
        p_seeds=_paired_t(difference_SG.sum(1) / words.sum()),
        p_text=p_text,
    )


def _paired_t(differences_S: Sequence[float] | Floats) -> float | None:
    if len(differences_S) < 2:
        return None
    found = float(stats.ttest_1samp(differences_S, 0.0).pvalue)
    return 1.0 if math.isnan(found) else found  # all differences are 0
