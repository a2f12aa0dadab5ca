"""A figure for each kind of item, where an item may be of several kinds (the skills that a question needs)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from symphony_vlm.evaluation.judgements import known_score
from symphony_vlm.evaluation.metrics import Metric, Outcome, mean_of

__all__ = ["by_kind"]


def by_kind(
    prefix: str,
    outcomes: Sequence[Outcome],
    kinds: Callable[[Outcome], Iterable[str]],
    *,
    values: Callable[[Outcome], float | None] = known_score,
    scale: float = 1.0,
) -> list[Metric]:
    """The mean ``prefix/kind`` for each kind that occurs, names sorted.

    Args:
        prefix: Of the metrics' names.
        outcomes: Of the benchmark.
        kinds: Outcome -> its kinds.
        values: As in `mean_of`.
        scale: As in `mean_of`.
    """
    names = sorted({kind for outcome in outcomes for kind in kinds(outcome)})
    return [mean_of(f"{prefix}/{name}", values, where=_of_kind(kinds, name), scale=scale) for name in names]


def _of_kind(kinds: Callable[[Outcome], Iterable[str]], name: str) -> Callable[[Outcome], bool]:
    return lambda outcome: name in kinds(outcome)
