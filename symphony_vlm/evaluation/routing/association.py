"""Whether the items whose routing drifts further are those whose answers go from right to wrong.

Shape letters: I items, G images, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_vlm.evaluation.routing.measures import roc_areas
from symphony_vlm.evaluation.statistics import bootstrap_weights, percentile_interval

__all__ = ["flip_association"]

Array = NDArray[Any]


def flip_association(
    drift_I: Array, clean_scores_I: Array, scores_I: Array, images: Sequence[str], *, seed: int, n_resamples: int
) -> dict[str, Any]:
    """ROC area of the drift for flips from right to wrong, among the items that are right when clean.

    Args:
        drift_I: of each item; NaN where it is not defined.
        clean_scores_I: at least 0.5 is right; NaN without a score.
        scores_I: the same under corruption.
        images: the unit of resampling.
        seed: of the bootstrap.
        n_resamples: R.

    Returns:
        ``value`` (0.5: no association; None if nothing flips or everything does), ``ci_low`` and ``ci_high`` (95 %,
        whole images resampled), ``n_flips``, ``n_kept``.
    """
    known_I = ~(np.isnan(drift_I) | np.isnan(scores_I)) & (np.nan_to_num(clean_scores_I, nan=0.0) >= 0.5)
    flipped_I = scores_I[known_I] < 0.5
    counts = {"n_flips": int(flipped_I.sum()), "n_kept": int((~flipped_I).sum())}
    if not all(counts.values()):
        return {"value": None, "ci_low": None, "ci_high": None, **counts}
    names, image_I = np.unique(np.asarray(images, dtype=str)[known_I], return_inverse=True)
    value = roc_areas(drift_I[known_I], flipped_I, np.ones((1, len(flipped_I))))[0]
    replicates = [
        roc_areas(drift_I[known_I], flipped_I, weights_RG[:, image_I])
        for weights_RG in bootstrap_weights(len(names), seed=seed, n_resamples=n_resamples)
    ]
    interval = percentile_interval(float(value), np.concatenate(replicates))
    return {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high, **counts}
