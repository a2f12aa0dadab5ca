"""Whether answers depend on what else is in the batch: in 16 bits rounding can, and some models' routing does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from symphony_vlm.evaluation.cell import answer_items
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.predictor import AnswersItems

__all__ = ["check_batches"]


def check_batches(
    cell: Cell,
    items: Sequence[EvaluationItem],
    predictor_of: Callable[[int], AnswersItems],
    *,
    n_items: int,
    batch_size: int,
) -> dict[str, Any]:
    """Answers a seeded sample twice: one question at a time, and in batches.

    Args:
        cell: where the items belong; its seed chooses the sample.
        items: to choose from.
        predictor_of: the model, by the number of questions and pictures that it takes at once.
        n_items: size of the sample.
        batch_size: the evaluation's.

    Returns:
        ``task``, ``n_items``, ``batch_size``, the ids of items with another text (``text_differences``) and of those
        with another score (``score_flips``), and ``batch_invariant``: there is none of the latter.
    """

    def rank(item: EvaluationItem) -> str:
        return hashlib.sha256(f"{cell.seed}/{item.id}".encode()).hexdigest()

    sample = sorted(items, key=rank)[:n_items]
    alone = answer_items(cell, sample, predictor_of(1), batch_size=1)
    together = answer_items(cell, sample, predictor_of(batch_size), batch_size=batch_size)
    pairs = [(item.id, alone[item.id], together[item.id]) for item in sample]
    flips = sorted(name for name, one, many in pairs if one["score"] != many["score"])
    return {
        "task": cell.task.name,
        "n_items": len(sample),
        "batch_size": batch_size,
        "text_differences": sorted(name for name, one, many in pairs if one["prediction"] != many["prediction"]),
        "score_flips": flips,
        "batch_invariant": not flips,
    }
