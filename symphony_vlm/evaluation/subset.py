"""Which items a limit takes: whole pictures of a seeded order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from symphony_vlm.evaluation.item import EvaluationItem

__all__ = ["first_pictures", "pictures_in_order"]


def pictures_in_order(items: Sequence[EvaluationItem], seed: int) -> list[list[EvaluationItem]]:
    """The items of each picture together, in an order that depends on the seed and the pictures' names alone."""
    groups: dict[str, list[EvaluationItem]] = {}
    for item in items:
        groups.setdefault(item.image_key, []).append(item)

    def rank(key: str) -> str:
        # The last part of a path, not all of it: another folder must give the same subset.
        return hashlib.sha256(f"{seed}/{key.rpartition('/')[2]}".encode()).hexdigest()

    return [groups[key] for key in sorted(groups, key=rank)]


def first_pictures(items: Sequence[EvaluationItem], seed: int, limit: int | None) -> list[EvaluationItem]:
    """The items of the first pictures that have ``limit`` of them together; with None all, in the same order."""
    chosen: list[EvaluationItem] = []
    for group in pictures_in_order(items, seed):
        if limit is not None and len(chosen) >= limit:
            break
        chosen += group
    return chosen
