"""Whether a model prefers letters: accuracy by the place of the right option, over all orders of its options."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

from symphony_vlm.evaluation.records import Record

__all__ = ["letter_bias"]


def letter_bias(records: Iterable[Record]) -> dict[str, Any] | None:
    """Chi-square test of "the score does not depend on the gold option's letter".

    The counts are of (item, order) pairs, with every item asked as often at each of its letters. Pairs of one item are
    not independent, so the p-value is a description, not a level.

    Args:
        records: of an option permutation; items whose options refer to others are left out.

    Returns:
        ``right`` and ``asked`` by letter, ``chi2``, ``dof`` and ``p`` (null where every answer is right or none is);
        None without records.
    """
    right: dict[str, float] = {}
    asked: dict[str, int] = {}
    for record in records:
        facts = record.get("attack_facts")
        if not facts or facts["refers_to_others"]:
            continue
        for letter, (hits, count) in facts["by_gold_letter"].items():
            right[letter] = right.get(letter, 0) + hits
            asked[letter] = asked.get(letter, 0) + count
    if not asked:
        return None
    names = sorted(asked)
    table = np.array([[right[name], asked[name] - right[name]] for name in names], dtype=float)
    found: dict[str, Any] = {"right": {n: right[n] for n in names}, "asked": {n: asked[n] for n in names}}
    if len(names) < 2 or (table.sum(0) == 0).any():
        return found | {"chi2": None, "dof": len(names) - 1, "p": None}
    test = stats.chi2_contingency(table, correction=False)
    return found | {"chi2": float(test.statistic), "dof": int(test.dof), "p": float(test.pvalue)}
