"""Intervals and paired tests for perplexities: lines, or articles of them, are what is drawn again.

Perplexity is the exponential of a ratio of sums, so each resample sums both sides anew.

Shape letters: I lines, G clusters (lines or articles), M columns (models, rates), R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from symphony_vlm.evaluation.statistics import Interval, bootstrap_weights, percentile_interval, sign_flip_tests

__all__ = ["N_RESAMPLES", "PairedDifference", "paired_per_word", "ratios"]

N_RESAMPLES = 2000
"""A 95 % interval's ends then differ by a few per cent of its width from those of infinitely many."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Nats per word of the second minus the first on the same lines, and how likely no difference is."""

    interval: Interval
    p_value: float
    n_lines: int
    n_clusters: int


def ratios(
    numerators_IM: ArrayLike, denominators_IM: ArrayLike, clusters: Sequence[str], *, seed: int
) -> tuple[Floats, Floats]:
    """Sums over sums, and their cluster bootstrap, all columns under the same weights.

    Args:
        numerators_IM: ``[I, M]``, e.g. nats.
        denominators_IM: ``[I, M]``, e.g. tokens.
        clusters: I names.
        seed: of the weights.

    Returns:
        ``[M]``, and replicates ``[R, M]``; NaN where a resample counts nothing.
    """
    top_GM = _by_cluster(np.asarray(numerators_IM, dtype=np.float64), clusters)
    bottom_GM = _by_cluster(np.asarray(denominators_IM, dtype=np.float64), clusters)
    with np.errstate(invalid="ignore", divide="ignore"):
        values_M = top_GM.sum(0) / bottom_GM.sum(0)
        replicates = [
            (weights_RG @ top_GM) / (weights_RG @ bottom_GM)
            for weights_RG in bootstrap_weights(len(top_GM), seed=seed, n_resamples=N_RESAMPLES)
        ]
    return values_M, np.concatenate(replicates)


def paired_per_word(
    first_I: ArrayLike, second_I: ArrayLike, words_I: ArrayLike, clusters: Sequence[str], *, seed: int
) -> PairedDifference:
    """Whether the second costs more nats per word than the first on the same lines.

    Args:
        first_I: nats of each line.
        second_I: nats of the same lines by another model, or attacked.
        words_I: words of each line, the same for both.
        clusters: the article, or the line itself.
        seed: of resamples and sign flips.
    """
    first, second, words = (np.asarray(values, dtype=np.float64) for values in (first_I, second_I, words_I))
    difference_I = second - first
    value_M, replicates_RM = ratios(difference_I[:, None], words[:, None], clusters, seed=seed)
    [p_value] = sign_flip_tests(difference_I[:, None], clusters, seed=seed, n_draws=20_000)
    return PairedDifference(
        interval=percentile_interval(value_M[0], replicates_RM[:, 0]),
        p_value=p_value,
        n_lines=int((words > 0).sum()),
        n_clusters=len(set(clusters)),
    )


def _by_cluster(values_IM: Floats, clusters: Sequence[str]) -> Floats:
    names, cluster_I = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    sums_GM = np.zeros((len(names), values_IM.shape[1]))
    np.add.at(sums_GM, cluster_I, values_IM)
    return sums_GM
