"""What the runner asks of an attack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from symphony_vlm.evaluation.item import EvaluationItem, Scored
from symphony_vlm.evaluation.metrics import Metric
from symphony_vlm.evaluation.pictures import Picture
from symphony_vlm.evaluation.predictor import AnswersItems
from symphony_vlm.evaluation.records import Record

__all__ = ["Attack", "Posed", "worst"]


@dataclass(frozen=True, kw_only=True)
class Posed:
    """One way in which an attack asks an item."""

    item: EvaluationItem
    features: Sequence[Any] | None
    """Of its pictures, as the predictor encodes them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What was done, for the record."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack with its budget. One that does nothing; each attack overrides what it changes."""

    name: ClassVar[str]
    own_pictures: ClassVar[bool] = False
    """Whether each question is shown a picture of its own, which then is encoded for it alone."""
    needs_gradient: ClassVar[bool] = False
    """Whether only models of this package can be attacked."""
    items_at_once: ClassVar[int | None] = None
    """So many items at most between two writes of records; None: the evaluation's batch."""

    @property
    def spec(self) -> str:
        """Name and budget, as ``--attack`` takes them, with every setting that has no default in it."""
        return self.name

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything that decides what is done, for the manifest; the seed is the evaluation's."""
        return {}

    def prepared(self, items: Sequence[EvaluationItem]) -> Attack:
        """The attack on a task with these items, all of them."""
        return self

    def applies_to(self, item: EvaluationItem) -> bool:
        """Whether the item can be attacked; the others are not in the cell."""
        return True

    def shown(self, item: EvaluationItem, pictures: Sequence[Picture], seed: int) -> tuple[Picture, ...]:
        """The pictures that the model is shown."""
        return tuple(pictures)

    def pose(
        self,
        item: EvaluationItem,
        pictures: Sequence[Picture],
        features: Sequence[Any] | None,
        predictor: AnswersItems,
        seed: int,
    ) -> list[Posed]:
        """The ways to ask; at least one.

        Args:
            item: what `applies_to`.
            pictures: as `shown`.
            features: of the pictures, or None without.
            predictor: the model.
            seed: of the evaluation.
        """
        return [Posed(item=item, features=features)]

    def conclude(self, posed: Sequence[Posed], scored: Sequence[Scored]) -> tuple[int, dict[str, Any]]:
        """Which way counts, and the ``attack_facts`` of the record; default: the worst for the model."""
        index = worst([one.score for one in scored])
        return index, dict(posed[index].facts)

    def asked(self, item: EvaluationItem, record: Record) -> EvaluationItem:
        """The item as it was asked in the way that counts: what the record's prediction answers."""
        return item

    def metrics(self, records: Mapping[str, Record]) -> list[Metric]:
        """Figures of the attack beside the task's own, from records by item id."""
        return []


def worst(scores: Sequence[float]) -> int:
    """Index of the smallest score, the first of equals; a score that only a judge can give (NaN) counts as the best."""
    return min(range(len(scores)), key=lambda index: math.inf if math.isnan(scores[index]) else scores[index])
