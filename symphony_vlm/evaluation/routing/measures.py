"""Measures of how far two routings lie apart: pure functions of arrays, over the last axis.

Shape letters: X any leading axes, E experts, K selected experts, N samples, R resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "coefficient_of_variation",
    "entropy",
    "jaccard_of_shared",
    "jensen_shannon",
    "kappa",
    "normalized",
    "rank_margin",
    "roc_areas",
    "shared_experts",
    "sparse_rows",
    "total_variation",
]

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]


def normalized(scores_XE: Floats) -> Floats:
    """Scores as distributions over the experts: negative ones count 0, rows sum to 1; a row of zeros is uniform.

    Scores sum to 1 only after a softmax without a graph; sigmoid scores and smoothed ones do not.
    """
    positive_XE = np.maximum(scores_XE, 0)
    total_X1 = positive_XE.sum(-1, keepdims=True)
    even = 1 / scores_XE.shape[-1]
    return np.where(total_X1 > 0, positive_XE / np.where(total_X1 > 0, total_X1, 1), even).astype(scores_XE.dtype)


def jensen_shannon(p_XE: Floats, q_XE: Floats) -> Floats:
    """Jensen-Shannon divergence in bits, 0 (equal) to 1 (disjoint): ``[..., E]`` twice to ``[...]``.

    ``JS = KL(p | m) / 2 + KL(q | m) / 2`` with ``m = (p + q) / 2`` (Lin 1991); the square of scipy's
    ``jensenshannon(p, q, base=2)``. Rows that are NaN give NaN.
    """
    middle_XE = (p_XE + q_XE) / 2
    # A p of 0 adds 0, and where m is 0 p is too.
    log_XE = np.log2(np.where(middle_XE > 0, middle_XE, 1))
    parts_XE = p_XE * (np.log2(np.where(p_XE > 0, p_XE, 1)) - log_XE)
    parts_XE += q_XE * (np.log2(np.where(q_XE > 0, q_XE, 1)) - log_XE)
    # Rounding of equal rows must not make a distance negative.
    result: Floats = np.maximum(parts_XE.sum(-1) / 2, 0)
    return result


def entropy(p_XE: Floats) -> Floats:
    """Entropy in nats, ``[..., E] -> [...]``."""
    result: Floats = -(p_XE * np.log(np.where(p_XE > 0, p_XE, 1))).sum(-1)
    return result


def total_variation(p_XE: Floats, q_XE: Floats) -> Floats:
    """``sum |p - q| / 2``, ``[..., E]`` twice to ``[...]``."""
    result: Floats = np.abs(p_XE - q_XE).sum(-1) / 2
    return result


def sparse_rows(weights_XK: Floats, indices_XK: Ints, num_experts: int) -> Floats:
    """Combination weights in the places of their experts, 0 elsewhere: ``[..., K] -> [..., E]``."""
    rows_XE = np.zeros((*weights_XK.shape[:-1], num_experts), dtype=weights_XK.dtype)
    np.put_along_axis(rows_XE, indices_XK.astype(np.int64), weights_XK, axis=-1)
    return rows_XE


def shared_experts(indices_XK: Ints, others_XK: Ints) -> Ints:
    """How many experts two selections share, ``[..., K]`` twice to ``[...]``, 0 to K."""
    count: Ints = np.zeros(indices_XK.shape[:-1], dtype=np.int64)
    for k in range(indices_XK.shape[-1]):
        count += (indices_XK[..., k, None] == others_XK).any(-1)
    return count


def jaccard_of_shared(shared_X: Ints | Floats, num_selected: int) -> Floats:
    """Jaccard index of two sets of K that share so many: ``s / (2 K - s)``."""
    result: Floats = shared_X / (2 * num_selected - shared_X)
    return result


def kappa(overlap_X: Floats, share_XE: Floats, other_XE: Floats, num_selected: int) -> Floats:
    """Overlap beyond chance, ``(o - e) / (1 - e)`` with ``e = sum_e pi_e pi'_e / K``; NaN where e is 1.

    A collapsed router selects the same experts for everything and has an overlap of 1 without being stable.

    Args:
        overlap_X: mean share of the K experts that two selections have in common.
        share_XE: pi, share of the tokens that select each expert; sums to K.
        other_XE: the same of the other selections.
        num_selected: K.
    """
    chance_X = (share_XE * other_XE).sum(-1) / num_selected
    room_X = 1 - chance_X
    # Shares are quotients of integers: what is left by rounding alone is no room.
    result: Floats = np.where(room_X > 1e-9, (overlap_X - chance_X) / np.where(room_X > 1e-9, room_X, 1), np.nan)
    return result


def rank_margin(scores_XE: Floats, num_selected: int) -> Floats:
    """Score of rank K minus that of rank K + 1, ``[..., E] -> [...]``; NaN where all experts are selected."""
    num_experts = scores_XE.shape[-1]
    if num_selected >= num_experts:
        return np.full(scores_XE.shape[:-1], np.nan, dtype=scores_XE.dtype)
    cut = num_experts - num_selected
    ordered_XE = np.sort(scores_XE, axis=-1)
    result: Floats = ordered_XE[..., cut] - ordered_XE[..., cut - 1]
    return result


def coefficient_of_variation(load_XE: Floats | Ints) -> Floats:
    """Standard deviation of the experts' load over its mean; 0 is an even load. NaN without any load."""
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Floats = load_XE.std(-1) / load_XE.mean(-1)
    return result


def roc_areas(values_N: Floats, positive_N: NDArray[np.bool_], weights_RN: Floats) -> Floats:
    """Area under the ROC curve for every row of sample weights, ``[R]``; NaN where a class has no weight.

    The chance that a positive sample has the larger value than a negative one, ties counting half: Mann and Whitney's
    statistic over the product of the class sizes.

    Args:
        values_N: what shall tell the classes apart.
        positive_N: which samples are positive.
        weights_RN: how often each sample counts; ones for the plain area.
    """
    order_N = np.argsort(values_N, kind="stable")
    ordered_N = values_N[order_N]
    starts = np.flatnonzero(np.concatenate([[True], ordered_N[1:] != ordered_N[:-1]]))
    positive_RN = weights_RN[:, order_N] * positive_N[order_N]
    negative_RN = weights_RN[:, order_N] * ~positive_N[order_N]
    # By groups of equal values.
    positive_RG = np.add.reduceat(positive_RN, starts, axis=1)
    negative_RG = np.add.reduceat(negative_RN, starts, axis=1)
    below_RG = np.cumsum(negative_RG, axis=1) - negative_RG / 2
    pairs_R = positive_RG.sum(1) * negative_RG.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Floats = np.where(pairs_R > 0, (positive_RG * below_RG).sum(1) / pairs_R, np.nan)
    return result
