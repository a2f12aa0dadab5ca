"""A number together with its bootstrap replicates, so that ratios and differences keep their intervals.

All quantities of one report are resampled with the same weights; combining them replicate by replicate is what makes
a difference paired and a ratio a bootstrapped ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from symphony_vlm.evaluation.statistics import Floats, percentile_interval

__all__ = ["Quantity", "difference", "log_ratio", "mean", "ratio", "weighted_sum"]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A value, its replicates if it could be resampled, and the reason if something is missing."""

    value: float | None
    replicates: Floats | None = None
    """``[R]``; None where there are no item scores to resample."""
    reason: str | None = None
    """Why there is no value, or no interval."""

    def to_json(self) -> dict[str, object]:
        """``{"value", "ci_low", "ci_high"}``, and ``"reason"`` where one of them is null."""
        if self.value is None:
            return {"value": None, "ci_low": None, "ci_high": None, "reason": self.reason or "not available"}
        if self.replicates is None or not np.isfinite(self.replicates).any():
            reason = self.reason or "no item scores to resample"
            return {"value": self.value, "ci_low": None, "ci_high": None, "reason": reason}
        interval = percentile_interval(self.value, self.replicates)
        return {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high}


def weighted_sum(parts: Sequence[Quantity], weights: Sequence[float]) -> Quantity:
    """``sum_i weights_i parts_i``; null if a part is null, without an interval if a part has none."""
    if not parts:
        return Quantity(value=None, reason="nothing to average")
    values = [part.value for part in parts]
    reason = next((part.reason for part in parts if part.reason), None)
    if any(value is None for value in values):
        return Quantity(value=None, reason=reason)
    value = float(sum(w * v for w, v in zip(weights, values, strict=True) if v is not None))
    columns = [part.replicates for part in parts]
    if any(column is None for column in columns):
        return Quantity(value=value, reason=reason)
    replicates = np.zeros_like(columns[0])
    for weight, column in zip(weights, columns, strict=True):
        assert column is not None
        replicates = replicates + weight * column
    return Quantity(value=value, replicates=replicates)


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
    with np.errstate(divide="ignore", invalid="ignore"):
        return Quantity(value=value, replicates=numerator.replicates / denominator.replicates)


def log_ratio(numerator: Quantity, denominator: Quantity, *, name: str) -> Quantity:
    """``log(numerator / denominator)``; null where the ratio is null or not positive."""
    quotient = ratio(numerator, denominator, name=name)
    if quotient.value is None or quotient.value <= 0:
        return Quantity(value=None, reason=quotient.reason or f"the ratio to the {name} is not positive")
    if quotient.replicates is None or (quotient.replicates <= 0).any():
        reason = quotient.reason or "no interval: the resampled ratio reaches 0"
        return Quantity(value=float(np.log(quotient.value)), reason=reason)
    return Quantity(value=float(np.log(quotient.value)), replicates=np.log(quotient.replicates))
