"""A number together with its bootstrap replicates, so that ratios and differences keep their intervals.

All quantities of one report are resampled with the same weights; combining them replicate by replicate is what makes
a difference paired and a ratio a bootstrapped ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from symphony_vlm.evaluation.statistics import (
    Floats,
    bca_interval,
    left_out_means,
    percentile_interval,
    resampled_means,
)

__all__ = [
    "INTERVAL_KINDS",
    "IntervalKind",
    "Quantity",
    "Resampling",
    "column_means",
    "constant",
    "difference",
    "log_ratio",
    "mean",
    "ratio",
    "weighted_sum",
]

IntervalKind = Literal["percentile", "bca"]
INTERVAL_KINDS: tuple[IntervalKind, ...] = ("percentile", "bca")


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How intervals and p-values are drawn."""

    seed: int = 0
    n_resamples: int = 10_000
    n_draws: int = 100_000
    """Random sign flips where more than 20 images differ."""
    interval: IntervalKind = "percentile"


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A value, its replicates if it could be resampled, and the reason if something is missing."""

    value: float | None
    replicates: Floats | None = None
    """``[R]``; None where there are no item scores to resample."""
    left_out: Floats | None = None
    """``[G]`` the value without one image each, where the BCa interval was asked for."""
    reason: str | None = None
    """Why there is no value, or no interval."""

    def to_json(self) -> dict[str, object]:
        """``{"value", "ci_low", "ci_high"}``, and ``"reason"`` where one of them is null."""
        if self.value is None:
            return {"value": None, "ci_low": None, "ci_high": None, "reason": self.reason or "not available"}
        if self.replicates is None or not np.isfinite(self.replicates).any():
            reason = self.reason or "no item scores to resample"
            return {"value": self.value, "ci_low": None, "ci_high": None, "reason": reason}
        if self.left_out is None:
            interval = percentile_interval(self.value, self.replicates)
        elif (found := bca_interval(self.value, self.replicates, self.left_out)) is not None:
            interval = found
        else:
            reason = self.reason or "no BCa interval: every resample lies on one side of the value"
            return {"value": self.value, "ci_low": None, "ci_high": None, "reason": reason}
        return {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high}


def column_means(scores_IM: Floats, images: Sequence[str], resampling: Resampling) -> list[Quantity]:
    """The mean of each column, all resampled with the same weights; without a value where a column has no score."""
    means_M, replicates_RM = resampled_means(
        scores_IM, images, seed=resampling.seed, n_resamples=resampling.n_resamples
    )
    left_GM = left_out_means(scores_IM, images) if resampling.interval == "bca" else None
    return [
        Quantity(value=None, reason="no item has a score")
        if np.isnan(value)
        else Quantity(
            value=float(value),
            replicates=replicates_RM[:, column],
            left_out=None if left_GM is None else left_GM[:, column],
        )
        for column, value in enumerate(means_M)
    ]


def constant(value: float, like: Quantity) -> Quantity:
    """A number that is known, with the replicates that let it be combined with ``like``."""
    return Quantity(
        value=value,
        replicates=None if like.replicates is None else np.full_like(like.replicates, value),
        left_out=None if like.left_out is None else np.full_like(like.left_out, value),
    )


def weighted_sum(parts: Sequence[Quantity], weights: Sequence[float]) -> Quantity:
    """``sum_i weights_i parts_i``; null if a part is null, without an interval if a part has none."""
    if not parts:
        return Quantity(value=None, reason="nothing to average")
    values = [part.value for part in parts]
    reason = next((part.reason for part in parts if part.reason), None)
    if any(value is None for value in values):
        return Quantity(value=None, reason=reason)
    value = float(sum(w * v for w, v in zip(weights, values, strict=True) if v is not None))
    replicates = _summed([part.replicates for part in parts], weights)
    if replicates is None:
        return Quantity(value=value, reason=reason)
    return Quantity(value=value, replicates=replicates, left_out=_summed([part.left_out for part in parts], weights))


def _summed(columns: Sequence[Floats | None], weights: Sequence[float]) -> Floats | None:
    known = [column for column in columns if column is not None]
    if len(known) < len(columns):
        return None
    total = np.zeros_like(known[0])
    for weight, column in zip(weights, known, strict=True):
        total = total + weight * column
    return total


def mean(parts: Sequence[Quantity]) -> Quantity:
    """The unweighted mean."""
    return weighted_sum(parts, [1 / len(parts)] * len(parts)) if parts else weighted_sum([], [])


def difference(first: Quantity, second: Quantity) -> Quantity:
    """``second - first``."""
    return weighted_sum([second, first], [1.0, -1.0])


def ratio(numerator: Quantity, denominator: Quantity, *, name: str, floor: float = 0.0) -> Quantity:
    """``numerator / denominator``, bootstrapped as a ratio.

    Args:
        numerator: Any quantity.
        denominator: Null result where it is 0 or below ``floor``; no interval where its own interval contains 0.
        name: What the denominator is, for the reason.
        floor: Smallest denominator that is divided by.
    """
    if numerator.value is None or denominator.value is None:
        return Quantity(value=None, reason=numerator.reason or denominator.reason)
    if denominator.value == 0 or denominator.value < floor:
        limit = "is 0" if denominator.value == 0 else f"is {denominator.value:.4g}, below {floor:g}"
        return Quantity(value=None, reason=f"{name} {limit}")
    value = numerator.value / denominator.value
    if numerator.replicates is None or denominator.replicates is None:
        return Quantity(value=value, reason=numerator.reason or denominator.reason)
    interval = percentile_interval(denominator.value, denominator.replicates)
    if not interval.excludes_zero:
        return Quantity(value=value, reason=f"no interval: that of the {name} contains 0")
    return Quantity(
        value=value,
        replicates=_divided(numerator.replicates, denominator.replicates),
        left_out=_divided(numerator.left_out, denominator.left_out),
    )


def _divided(first: Floats | None, second: Floats | None) -> Floats | None:
    if first is None or second is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Floats = first / second
    return quotient


def log_ratio(numerator: Quantity, denominator: Quantity, *, name: str) -> Quantity:
    """``log(numerator / denominator)``; null where the ratio is null or not positive."""
    quotient = ratio(numerator, denominator, name=name)
    if quotient.value is None or quotient.value <= 0:
        return Quantity(value=None, reason=quotient.reason or f"the ratio to the {name} is not positive")
    if quotient.replicates is None or (quotient.replicates <= 0).any():
        reason = quotient.reason or "no interval: the resampled ratio reaches 0"
        return Quantity(value=float(np.log(quotient.value)), reason=reason)
    left_out = quotient.left_out
    if left_out is not None:
        left_out = np.log(np.where(left_out > 0, left_out, np.nan))
    return Quantity(value=float(np.log(quotient.value)), replicates=np.log(quotient.replicates), left_out=left_out)
