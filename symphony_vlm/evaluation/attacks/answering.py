"""Answers items under an attack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from symphony_vlm.evaluation.answer import Answer
from symphony_vlm.evaluation.attacks.attack import Attack, Posed
from symphony_vlm.evaluation.cells import Cell
from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.pictures import Picture
from symphony_vlm.evaluation.predictor import AnswersItems

__all__ = ["Encoded", "answer_attacked"]


class Encoded(Protocol):
    """An item whose pictures have been opened and encoded."""

    @property
    def item(self) -> EvaluationItem:
        """What is asked."""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """What the model is shown."""

    @property
    def features(self) -> Sequence[Any] | None:
        """What it makes of them."""


def answer_attacked(
    attack: Attack, cell: Cell, predictor: AnswersItems, batch: Sequence[Encoded], *, at_once: int
) -> list[Answer]:
    """For each item the answer that counts.

    Args:
        attack: with its budget.
        cell: what is evaluated; its task scores the answers, its seed is the attack's.
        predictor: the model.
        batch: items that the attack applies to.
        at_once: questions asked together, which an attack that asks in many ways makes of few items.

    Returns:
        Answers whose facts have ``attack_facts``, and in the place of the item's own the question as it was asked,
        the reference, and the score.
    """
    posed = [attack.pose(one.item, one.pictures, one.features, predictor, cell.seed) for one in batch]
    flat = [way for ways in posed for way in ways]
    given: list[str] = []
    for start in range(0, len(flat), at_once):
        ways = flat[start : start + at_once]
        given += predictor.answer([way.item for way in ways], [way.features for way in ways])
    answers = iter(given)
    return [_concluded(attack, cell, ways, [next(answers) for _ in ways]) for ways in posed]


def _concluded(attack: Attack, cell: Cell, posed: Sequence[Posed], answers: Sequence[str]) -> Answer:
    scored = [cell.task.score(answer, way.item) for answer, way in zip(answers, posed, strict=True)]
    index, attack_facts = attack.conclude(posed, scored)
    answer, asked = answers[index], posed[index].item
    facts = dict(answer.facts) if isinstance(answer, Answer) else {}
    result = scored[index]
    as_asked = {
        "question": asked.question,
        "answer": asked.answers[0] if asked.answers else None,
        "parsed": result.parsed,
        "parse_status": result.status,
        "score": None if math.isnan(result.score) else result.score,
        "lenient": result.lenient,
    }
    return Answer(str(answer), facts | as_asked | {"attack_facts": attack_facts})
