"""Attacks by name and budget, as ``--attack`` gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.attacks.attack import Attack
from symphony_vlm.evaluation.attacks.option_permutation import OptionPermutation
from symphony_vlm.evaluation.attacks.pgd import Apgd, Pgd
from symphony_vlm.evaluation.attacks.question_swap import QuestionSwap
from symphony_vlm.evaluation.attacks.typographic import Typographic
from symphony_vlm.evaluation.attacks.word_swap import PROFILES
from symphony_vlm.text import nearest

__all__ = ["BUDGETS", "parse_attacks"]

BUDGETS = {
    "word_swap": "word_swap[:RATE[:textattack|exact]]",
    "typographic": "typographic[:SIZE[:OPACITY]]",
    "option_permutation": "option_permutation[:all]",
    "pgd": "pgd[:EPS[:STEPS[:RESTARTS]]]",
    "apgd": "apgd[:EPS[:STEPS[:RESTARTS]]]",
}
"""How each attack is written."""


def parse_attacks(text: str) -> tuple[Attack, ...]:
    """The attacks of a list such as ``word_swap:0.1,pgd:4/255:10``; none of ``none``.

    Raises:
        InputError: an unknown name, a budget that cannot be, or an attack twice.
    """
    specs = [part.strip() for part in text.split(",") if part.strip()]
    if specs in ([], ["none"]):
        return ()
    attacks = tuple(map(_parse, specs))
    for index, attack in enumerate(attacks):
        if attack.spec in [other.spec for other in attacks[:index]]:
            raise InputError(f"{attack.spec} stands there twice", where="--attack")
    return attacks


def _parse(spec: str) -> Attack:
    name, *budget = spec.split(":")
    if name not in BUDGETS:
        raise InputError(
            f"no attack {name!r}{nearest(name, BUDGETS)}",
            where="--attack",
            remedy=f"Attacks: {', '.join(BUDGETS.values())}; or none.",
        )
    makers: dict[str, tuple[int, Callable[[_Budget], Attack]]] = {
        "word_swap": (2, _word_swap),
        "typographic": (2, _typographic),
        "option_permutation": (1, _option_permutation),
        "pgd": (3, partial(_pgd, Pgd)),
        "apgd": (3, partial(_pgd, Apgd)),
    }
    most, make = makers[name]
    if len(budget) > most:
        raise InputError(f"{spec!r} has too many parts", where="--attack", remedy=f"Write {BUDGETS[name]}.")
    return make(_Budget(spec, name, budget))


class _Budget:
    """The parts of a budget, each with its bounds."""

    def __init__(self, spec: str, name: str, parts: Sequence[str]) -> None:
        self._spec = spec
        self._name = name
        self._parts = list(parts)

    def share(self, place: int, what: str, default: Fraction) -> Fraction:
        """A number above 0 and at most 1, as decimal or as fraction."""
        text = self._part(place)
        if text is None:
            return default
        try:
            value = Fraction(text)
        except (ValueError, ZeroDivisionError):
            value = Fraction(0)
        if not 0 < value <= 1:
            raise self._error(what, text, "a number above 0 and at most 1, such as 0.1 or 4/255")
        return value

    def count(self, place: int, what: str, default: int, most: int) -> int:
        """A whole number from 1."""
        text = self._part(place)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
            raise self._error(what, text, f"a whole number from 1 to {most}")
        return int(text)

    def word(self, place: int, what: str, default: str, words: Sequence[str]) -> str:
        """One of some words."""
        text = self._part(place)
        if text is not None and text not in words:
            raise self._error(what, text, " or ".join(words))
        return default if text is None else text

    def _part(self, place: int) -> str | None:
        return self._parts[place] if place < len(self._parts) else None

    def _error(self, what: str, text: str, expected: str) -> InputError:
        return InputError(
            f"the {what} is {text!r}; it must be {expected}",
            where=f"--attack {self._spec}",
            remedy=f"Write {BUDGETS[self._name]}.",
        )


def _word_swap(budget: _Budget) -> Attack:
    rate = budget.share(0, "rate", Fraction(str(QuestionSwap.rate)))
    profile = budget.word(1, "profile", QuestionSwap.profile, PROFILES)
    return QuestionSwap(rate=float(rate), profile=PROFILES[PROFILES.index(profile)])


def _typographic(budget: _Budget) -> Attack:
    size = budget.share(0, "size", Fraction(str(Typographic.size)))
    opacity = budget.share(1, "opacity", Fraction(str(Typographic.opacity)))
    return Typographic(size=float(size), opacity=float(opacity))


def _option_permutation(budget: _Budget) -> Attack:
    return OptionPermutation(every=budget.word(0, "budget", "", ("all",)) == "all")


def _pgd(kind: type[Pgd], budget: _Budget) -> Attack:
    return kind(
        eps=budget.share(0, "eps", Pgd.eps),
        steps=budget.count(1, "number of steps", Pgd.steps, 10_000),
        restarts=budget.count(2, "number of restarts", Pgd.restarts, 100),
    )
