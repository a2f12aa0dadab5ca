"""Scores that are not known yet: a judge has to be asked first, or the answers are not public.

Such a score is NaN, so that no figure can take it for a wrong answer.
"""

from __future__ import annotations

import math

from symphony_vlm.evaluation.item import Outcome, Scored

__all__ = ["known_lenient", "known_score", "not_judged"]


def not_judged(prediction: str) -> Scored:
    """The score of an answer that nobody has judged."""
    text = prediction.strip()
    return Scored(score=math.nan, parsed=text, status="ok" if text else "empty")


def known_score(outcome: Outcome) -> float | None:
    """The score; None if it is not known, so that it is in no mean."""
    return outcome.scored.score if _is_known(outcome) else None


def known_lenient(outcome: Outcome) -> float | None:
    """The score by the forgiving rule, where there is one; None if it is not known."""
    if not _is_known(outcome):
        return None
    return outcome.scored.score if outcome.scored.lenient is None else outcome.scored.lenient


def _is_known(outcome: Outcome) -> bool:
    return bool(outcome.item.answers) and not math.isnan(outcome.scored.score)
