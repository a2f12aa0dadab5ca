"""Shared rules against the vectors of the official evaluations."""

from __future__ import annotations

import pytest

from symphony_vlm.evaluation.item import EvaluationItem
from symphony_vlm.evaluation.rules.letters import (
    lenient_letter,
    letters,
    options_block,
    score_letter,
    split_options,
    strict_letter,
)
from symphony_vlm.evaluation.rules.mmmu import mmmu_letter
from symphony_vlm.evaluation.rules.numbers import extract_numbers, normalize_answer, open_answers, open_is_right
from symphony_vlm.evaluation.rules.yes_no import first_yes_no, mme_answer, only_yes_or_no, pope_answer

CHOICES = ("a red fox", "two dogs", "three", "nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NO", "yes"),
        ("no\n", "yes"),
        ("", "yes"),
        ("unknown", "yes"),
        ("Nothing", "yes"),
        ("There is not a cat.", "no"),
        ("I do not. Yes", "no"),
        ("Yes. No dog.", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("Not", "yes"),  # only these three spellings
        ("well,no", "yes"),  # a comma is deleted, not replaced
        ("well, no", "no"),
        ("no.", "no"),
    ],
)
def test_pope(text: str, expected: str) -> None:
    assert pope_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Not sure", "no"),
        ("Nothing", "no"),
        ("The answer is yes", "other"),
        ("  Yes", "other"),
        ("", "other"),
        ("Yes", "yes"),
        (" yes", "yes"),
        ("no", "no"),
        ("NO.", "no"),
        ("eyes", "yes"),
        ("y no", "no"),
    ],
)
def test_mme(text: str, expected: str) -> None:
    assert mme_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "first", "only"),
    [
        ("The answer is YES.", "yes", "yes"),
        ("No, it is not. Yes?", "no", None),
        ("yes no", "yes", None),
        ("Nothing", None, None),
        ("", None, None),
        ("eyes", None, None),
        ("no no", "no", "no"),
    ],
)
def test_lenient_yes_no(text: str, first: str | None, only: str | None) -> None:
    assert first_yes_no(text) == first
    assert only_yes_or_no(text) == only


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A", "A"), (" B\n", "B"), ("D", "D"), ("E", None), ("a", None), ("A.", None), ("AB", None), ("", None)],
)
def test_strict_letter(text: str, expected: str | None) -> None:
    assert strict_letter(text, 4) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # (a) one letter among the last four tokens.
        ("B.", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("The correct option is B", "B"),
        ("{A}", "A"),
        ("B is what I would say", None),  # first occurrence too early
        ("I say B it is so", "B"),  # the fourth from the end
        ("I say B and it is so", None),
        ("A or B", None),
        ("B B", "B"),  # one letter, twice
        # (b) answer is.
        ("The answer is b", "B"),
        ("A or B? The ANSWER IS *B*", "B"),
        ("A or B? The answer is **B** of course", "B"),
        ("A, B, C: the answer is between", None),  # no letter of its own follows
        ("E or A; the answer is E", None),  # E is no option, and A stands too early for (a)
        # (c) the only option whose text occurs.
        ("two dogs", "B"),
        ("I see TWO DOGS.", "B"),
        ("two dogs and three cats", None),
        ("Three" + " very" * 20, None),  # longer than twice all options together
        ("", None),
        ("dunno", None),
    ],
)
def test_lenient_letter(text: str, expected: str | None) -> None:
    assert lenient_letter(text, CHOICES) == expected


def test_the_length_limit_of_the_lenient_letter_is_twice_the_options() -> None:
    limit = 2 * sum(map(len, CHOICES))
    text = "three".ljust(limit, ".")
    assert lenient_letter(text, CHOICES) == "C"
    assert lenient_letter(text + ".", CHOICES) is None


def test_scoring_letters_keeps_the_two_rules_apart() -> None:
    item = EvaluationItem(id="1", question="?", answers=("B",), choices=CHOICES)
    strict, verbose = score_letter("B", item), score_letter("It is B.", item)
    assert (strict.score, strict.status, strict.lenient) == (1.0, "ok", 1.0)
    assert (verbose.score, verbose.status, verbose.lenient) == (0.0, "unparsed", 1.0)
    wrong = score_letter("A", item)
    assert (wrong.score, wrong.parsed, wrong.lenient) == (0.0, "A", 0.0)
    assert score_letter(" ", item).status == "empty"


def test_letters_and_options() -> None:
    assert letters(3) == "ABC"
    assert options_block(("x", "y")) == "A. x\nB. y"
    with pytest.raises(ValueError, match="27 options"):
        letters(27)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Which?\nOptions: A: red, B: dark blue, C: A: b, D: none", ("red", "dark blue", "A: b", "none")),
        ("Which?\nA. left\nB. right\nAnswer with the letter.", ("left", "right")),
        ("Which? (A) one (B) two", ()),
        ("What time is it at 3. A. M.?", ()),
        ("No options", ()),
    ],
)
def test_options_inside_a_question(question: str, expected: tuple[str, ...]) -> None:
    assert split_options(question) == expected


MMMU_CHOICES = ("$6", "$7", "the long one", "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(A)", "A"),
        ("(A) or B", "A"),  # with brackets, others do not count
        ("A or B", "B"),  # the one that occurs last
        ("(B) then (A) then (B)", "B"),
        ("I think it must be the LONG one here", "C"),
        ("the long one", None),  # not more than five words
        ("it is the long one", None),  # five words
        ("it is clearly the long one", "C"),  # six words
        ("none of us think the long one", "C"),
        ("", None),
        ("b", None),
        ("Because", None),
        ("'B'", "B"),
        (".,B", None),  # comma before full stop: "." guards the comma, so ",B" stays
        (",.B", "B"),
    ],
)
def test_mmmu_multiple_choice(text: str, expected: str | None) -> None:
    assert mmmu_letter(text, MMMU_CHOICES) == expected


def test_numbers_of_an_answer() -> None:
    # The third pattern also finds what is left of the others' numbers, as in the official script.
    assert extract_numbers("1,000 and 2.5e3 or -3.5 12") == ["1,000", "2.5e3", "000", "2", "3", "-3.5", "12"]
    assert normalize_answer("1,234.567") == [1234.57]
    assert normalize_answer(" B ") == [" b", "b "]
    assert normalize_answer("Cat") == ["cat"]


@pytest.mark.parametrize(
    ("response", "gold", "expected"),
    [
        ("The answer is 8.", ("8",), True),
        ("8.004", ("8",), True),  # rounded to two digits
        ("8.01", ("8",), False),
        ("so x = 1,000", ("1000",), True),
        ("It is 18", ("8",), False),  # a number inside another is not equal
        ("MgS", ("$MgS$", "MgS"), True),
        ("the compound is mgs indeed", ("MgS",), True),
        ("is a cat", ("dog",), False),
        ("b", ("B",), True),
        ("abc", ("B",), False),  # a single letter needs its space
        ("therefore 3\nx = 5", ("5",), True),
        ("x = 5\nwhatever", ("5",), True),  # no tail at all: the whole answer, with its numbers
        ("x = 5\nso it was", ("5",), False),  # = counts in the last part only, and the tail leaves 5 out
        ("the answer is :", ("the answer is :",), True),  # one punctuation mark is no tail: the whole
        ("", ("8",), False),
    ],
)
def test_mmmu_open(response: str, gold: tuple[str, ...], expected: bool) -> None:
    assert open_is_right(open_answers(response), gold) is expected


def test_an_empty_tail_never_wins_over_a_later_one() -> None:
    # "so " leaves nothing, "is " comes later in the list and leaves a text.
    assert open_answers("it is four so ") == open_answers("it is four so") == ["four so"]
