"""Attacks by name and budget: what is understood, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest

from symphony_vlm.errors import InputError
from symphony_vlm.evaluation.attacks.catalogue import parse_attacks
from symphony_vlm.evaluation.attacks.pgd import Pgd
from symphony_vlm.evaluation.attacks.question_swap import QuestionSwap


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("word_swap", "word_swap:0.015"),
        ("word_swap:0.10", "word_swap:0.1"),
        ("word_swap:1/4:exact", "word_swap:0.25:exact"),
        ("typographic", "typographic"),
        ("typographic:0.3", "typographic:0.3"),
        ("typographic:0.15:0.5", "typographic:0.15:0.5"),
        ("option_permutation", "option_permutation"),
        ("option_permutation:all", "option_permutation:all"),
        ("pgd", "pgd:4/255:10"),
        ("pgd:8/255:50:3", "pgd:8/255:50:3"),
        ("pgd:0.1", "pgd:0.1:10"),
        ("pgd:1:5", "pgd:1:5"),
        ("apgd:2/255:20", "apgd:2/255:20"),
    ],
)
def test_a_spec_has_every_setting_and_says_the_same_when_read_again(text: str, spec: str) -> None:
    (attack,) = parse_attacks(text)
    assert attack.spec == spec
    assert parse_attacks(spec) == (attack,)


def test_several_are_separated_by_commas() -> None:
    assert parse_attacks("word_swap:0.1, pgd:2/255:4") == (QuestionSwap(rate=0.1), Pgd(eps=Fraction(2, 255), steps=4))
    assert parse_attacks("none") == parse_attacks("") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wordswap", "no attack 'wordswap'.*word_swap"),
        ("word_swap:0", "rate is '0'; it must be a number above 0 and at most 1"),
        ("word_swap:2", "rate is '2'"),
        ("word_swap:nan", "rate is 'nan'"),
        ("word_swap:0.1:often", "profile is 'often'; it must be textattack or exact"),
        ("pgd:4", "eps is '4'.*4/255"),
        ("pgd:4/0", "eps is '4/0'"),
        ("pgd:-1/255", "eps is '-1/255'"),
        ("pgd:4/255:0", "number of steps is '0'"),
        ("pgd:4/255:ten", "number of steps is 'ten'"),
        ("pgd:4/255:10:0", "number of restarts is '0'"),
        ("pgd:4/255:10:1:9", "too many parts"),
        ("typographic:9", "size is '9'"),
        ("option_permutation:6", "budget is '6'; it must be all"),
        ("pgd,pgd:4/255", "stands there twice"),
        ("none,pgd", "no attack 'none'"),
    ],
)
def test_budgets_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_attacks(text)
