"""Asks a multiple choice with its options in every order (ys-zong/FoolyourVLLMs, arXiv 2310.01651)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from symphony_vlm.corruptions.randomness import corruption_rng
from symphony_vlm.evaluation.attacks.attack import Attack, Posed, worst
from symphony_vlm.evaluation.attacks.option_places import option_places
from symphony_vlm.evaluation.item import EvaluationItem, Outcome, Scored
from symphony_vlm.evaluation.metrics import Metric, mean_of
from symphony_vlm.evaluation.pictures import Picture
from symphony_vlm.evaluation.predictor import AnswersItems
from symphony_vlm.evaluation.records import Record
from symphony_vlm.evaluation.rules.letters import letters

__all__ = ["SAMPLED_ORDERS", "OptionPermutation", "option_orders", "permuted", "refers_to_others"]

Order = tuple[int, ...]
"""Which of the original options stands at each letter."""

MAX_EVERY_ORDER = 4
SAMPLED_ORDERS = 24
"""Orders of more than four options; their rotations are among them."""

_LETTER = r"\(?\b[A-H]\b\)?"
_OTHERS = re.compile(
    r"(?i:\b(?:all|none|both|neither|either|any)\s+(?:of\s+)?(?:the\s+)?(?:above|these|those|them|options|choices)\b)"
    rf"|(?i:\b(?:both|neither|either))\s+{_LETTER}\s*(?:,|&|and\b|or\b|nor\b)\s*{_LETTER}"
    rf"|^\s*(?:[Oo]nly\s+)?{_LETTER}(?:\s*,\s*{_LETTER})*\s*(?:,|&|,?\s*and\b|,?\s*or\b)\s*{_LETTER}(?:\s+only)?\s*\.?$"
    r"|(?i:^\s*(?:both|neither|all|none)\s*\.?$)"
)
"""Letters in upper case only: "both hands" speaks of no option."""


def option_orders(k: int, seed: int = 0, *, every: bool = False) -> list[Order]:
    """The orders in which k options are asked, the original one first.

    All k! up to four options, in lexical order: no seed. Of more a seeded sample of 24 that has the k rotations.

    Args:
        k: number of options, 2 to 24.
        seed: of the sample, which is the same for every item.
        every: all k! of five options too.
    """
    if k <= MAX_EVERY_ORDER or (every and k == MAX_EVERY_ORDER + 1):
        return list(itertools.permutations(range(k)))
    orders = [tuple((start + place) % k for place in range(k)) for start in range(k)]
    rng = corruption_rng("0" * 64, "option_permutation", k, seed)
    known = set(orders)
    while len(orders) < SAMPLED_ORDERS:
        order = tuple(int(index) for index in rng.permutation(k))
        if order not in known:
            known.add(order)
            orders.append(order)
    return orders


def refers_to_others(choice: str) -> bool:
    """Whether an option speaks of the others: "all of the above", "both A and B", "none of these"."""
    return _OTHERS.search(choice) is not None


def permuted(item: EvaluationItem, order: Order) -> EvaluationItem:
    """The item with the option ``order[i]`` at the i-th letter, in its question, its choices and its answer."""
    places = option_places(item)
    assert places is not None  # only items with places are attacked
    texts = [item.choices[index].strip() for index in order]
    names = letters(len(order))
    answers = item.answers
    if answers[0] in tuple(names):
        answers = (names[order.index(names.index(answers[0]))], *answers[1:])
    choices = tuple(item.choices[index] for index in order)
    return replace(item, question=places.with_texts(texts), choices=choices, answers=answers)


@dataclass(frozen=True, kw_only=True)
class OptionPermutation(Attack):
    """Right only if right in every order.

    Attributes:
        every: all 120 orders of five options, in place of 24.
    """

    name: ClassVar[str] = "option_permutation"
    every: bool = False

    @property
    def spec(self) -> str:
        """The name; ``option_permutation:all`` for all orders of five options."""
        return f"{self.name}:all" if self.every else self.name

    @property
    def parameters(self) -> dict[str, Any]:
        """How many orders."""
        return {"every_order_up_to": 5 if self.every else 4, "orders_of_more": SAMPLED_ORDERS}

    def applies_to(self, item: EvaluationItem) -> bool:
        """Two to 24 options that stand in the question, one of which is the reference."""
        return 2 <= len(item.choices) <= SAMPLED_ORDERS and _gold(item) is not None and option_places(item) is not None

    def pose(
        self,
        item: EvaluationItem,
        pictures: Sequence[Picture],
        features: Sequence[Any] | None,
        predictor: AnswersItems,
        seed: int,
    ) -> list[Posed]:
        """One way per order; the pictures' features are shared."""
        names = letters(len(item.choices))
        return [
            Posed(
                item=permuted(item, order), features=features, facts={"order": "".join(names[index] for index in order)}
            )
            for order in option_orders(len(item.choices), seed, every=self.every)
        ]

    def conclude(self, posed: Sequence[Posed], scored: Sequence[Scored]) -> tuple[int, dict[str, Any]]:
        """The worst order, and over all orders the mean, the contents chosen, and hits by the gold option's letter."""
        names = letters(len(posed[0].item.choices))
        contents = [_content(one.facts["order"], result, names) for one, result in zip(posed, scored, strict=True)]
        by_letter: dict[str, list[float]] = {}
        for one, result in zip(posed, scored, strict=True):
            gold = _gold(one.item)
            assert gold is not None
            hits = by_letter.setdefault(names[gold], [0, 0])
            hits[0] += result.score
            hits[1] += 1
        index = worst([one.score for one in scored])
        return index, {
            **posed[index].facts,
            "n_orders": len(posed),
            "mean_score": sum(one.score for one in scored) / len(scored),
            # The option that was meant in each order, by its original letter; null where no letter was read.
            "contents": dict(zip((one.facts["order"] for one in posed), contents, strict=True)),
            "consistent": None not in contents and len(set(contents)) == 1,
            "by_gold_letter": by_letter,
            "refers_to_others": any(map(refers_to_others, posed[0].item.choices)),
        }

    def asked(self, item: EvaluationItem, record: Record) -> EvaluationItem:
        """The item in the worst order."""
        names = letters(len(item.choices))
        return permuted(item, tuple(names.index(letter) for letter in record["attack_facts"]["order"]))

    def metrics(self, records: Mapping[str, Record]) -> list[Metric]:
        """Worst case, mean and consistency, without the items whose options refer to others; those apart."""
        facts = {name: record["attack_facts"] for name, record in records.items() if record.get("attack_facts")}
        metrics: list[Metric] = []
        for suffix, wanted in (("", False), ("_referring", True)):
            chosen = {name for name, fact in facts.items() if fact["refers_to_others"] is wanted}
            if not chosen:
                continue
            where = _among(chosen)
            metrics += [
                mean_of(f"worst_case{suffix}", where=where),
                mean_of(f"mean_over_orders{suffix}", _fact(facts, "mean_score"), where=where),
                mean_of(f"consistency{suffix}", _fact(facts, "consistent"), where=where),
            ]
        plain = {name: fact for name, fact in facts.items() if not fact["refers_to_others"]}
        for letter in sorted({letter for fact in plain.values() for letter in fact["by_gold_letter"]}):
            metrics.append(_at_letter(letter, plain))
        return metrics


def _among(chosen: set[str]) -> Any:
    return lambda outcome: outcome.item.id in chosen


def _fact(facts: Mapping[str, Mapping[str, Any]], name: str) -> Any:
    return lambda outcome: float(facts[outcome.item.id][name]) if outcome.item.id in facts else None


def _at_letter(letter: str, facts: Mapping[str, Mapping[str, Any]]) -> Metric:
    """Accuracy over the orders that have the gold option at the letter."""

    def value(outcome: Outcome) -> float | None:
        hits = facts[outcome.item.id]["by_gold_letter"].get(letter) if outcome.item.id in facts else None
        return None if hits is None else float(hits[0] / hits[1])

    return mean_of(f"gold_at_{letter}", value, where=lambda outcome: value(outcome) is not None)


def _gold(item: EvaluationItem) -> int | None:
    """Which option is the reference: a letter, or the text of one option."""
    if not item.answers:
        return None
    answer, names = item.answers[0], letters(min(len(item.choices), 26))
    if answer in tuple(names):
        return names.index(answer)
    same = [index for index, choice in enumerate(item.choices) if choice.strip() == answer.strip()]
    return same[0] if len(same) == 1 else None


def _content(order: str, scored: Scored, names: str) -> str | None:
    """The original letter of the option that was chosen."""
    return order[names.index(scored.parsed)] if scored.parsed in tuple(names) else None
